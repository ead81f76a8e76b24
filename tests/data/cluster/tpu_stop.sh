set -e
gcloud compute tpus tpu-vm ssh retro --project p --zone us-east5-a --worker=all '--command=cd "$HOME/retro" && touch stop && pkill -TERM -P "$(cat pid.txt)" || true
for i in $(seq 600); do kill -0 "$(cat pid.txt)" || break; sleep 1; done
' || true
gcloud compute tpus queued-resources delete retro --project p --zone us-east5-a --force --quiet
