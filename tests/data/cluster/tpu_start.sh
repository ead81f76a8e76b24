set -e
bash -c 'git archive --format=tar.gz HEAD | gcloud storage cp - gs://b/code/retro.tar.gz'
gcloud compute tpus queued-resources create retro --accelerator-type v5p-128 --runtime-version v2-alpha-tpuv5 --node-id retro --project p --zone us-east5-a
bash -c 'until [ "$(gcloud compute tpus queued-resources describe retro --project p --zone us-east5-a '"'"'--format=value(state.state)'"'"')" = ACTIVE ]; do sleep 30; done'
gcloud compute tpus tpu-vm ssh retro --project p --zone us-east5-a --worker=all '--command=set -euo pipefail
mkdir -p "$HOME/retro" && cd "$HOME/retro"
rm -f stop
gcloud storage cp gs://b/code/retro.tar.gz - | tar xz
test -x .venv/bin/python || python3.11 -m venv .venv || {
  sudo apt-get update -q && sudo apt-get install -qy python3.11 python3.11-venv
  python3.11 -m venv .venv
}
.venv/bin/pip install -q --constraint constraints.txt --editable '"'"'.[data,tpu,gcs]'"'"'
export PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1
cat > run.sh <<'"'"'RUN'"'"'
for start in $(seq 100); do
  status=0
  python -m launch.train --gin_file=experiments/retro_172m.gin --workdir=/mnt/shared/retro || status=$?
  echo "ended with status $status"
  test -e stop && exit $status
  case $status in 75|76|134) sleep 10 ;; *) exit $status ;; esac
done
RUN
nohup bash run.sh >> log.txt 2>&1 < /dev/null &
echo $! > pid.txt
'
