set -e
bash -c 'gcloud compute tpus tpu-vm ssh retro-0 --project p --zone us-east5-a --worker=all '"'"'--command=tail -n 100 -F $HOME/retro/log.txt | sed "s/^/$(hostname): /"'"'"' & gcloud compute tpus tpu-vm ssh retro-1 --project p --zone us-east5-a --worker=all '"'"'--command=tail -n 100 -F $HOME/retro/log.txt | sed "s/^/$(hostname): /"'"'"' & wait'
