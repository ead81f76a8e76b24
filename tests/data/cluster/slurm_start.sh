set -e
rm -f retro.stop
sbatch <<'END'
#!/bin/bash
#SBATCH --job-name=retro
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --partition=gpu
#SBATCH --time=24:00:00
#SBATCH --output=retro-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@600

export PYTHONUNBUFFERED=1
status=0
srun --kill-on-bad-exit=1 --label /venv/bin/python -m launch.train --gin_file=experiments/retro_172m.gin --workdir=/mnt/shared/retro || status=$?
echo "ended with status $status"
if [ -e "retro.stop" ] || [ "${SLURM_RESTART_COUNT:-0}" -ge 100 ]; then
  exit "$status"
fi
case "$status" in
  75|76|134|137|143) scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$status"
END
