#!/usr/bin/env bash
# Pretraining on several machines under SLURM: one launcher on each.
#
#   sbatch --nodes=4 --gpus-per-node=8 runs/slurm.sh --data=climbmix --depth=24 --save-every=250
#
# Two minutes before the time limit SLURM sends this script SIGUSR1, which it forwards: the run finishes its step and
# saves, and the job requeues itself and continues from there (--resume). SLURM requeues it too when a node fails. The
# base folder must be on a disk that all nodes share. (Not SIGTERM, on which srun kills the step.) Each rank tokenises
# on its share of the cores: without --cpus-per-gpu, or bound, the ranks of a node could get one core together.
#SBATCH --job-name=nanochat
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-gpu=8
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD="${NODES%%$'\n'*}" # the first line; `| head -n 1` can kill scontrol with SIGPIPE, and the job with it
GPUS="${SLURM_GPUS_ON_NODE:-8}" CODE=0 SIGNALLED=

trap 'SIGNALLED=1; kill -USR1 "$STEP"' USR1
srun --cpu-bind=none .venv/bin/python -m scripts.launch --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$GPUS" --max-restarts="${MAX_RESTARTS:-3}" \
  --shutdown-timeout=100 --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$HEAD:${PORT:-29500}" \
  -m scripts.base_train -- --resume "$@" & STEP=$!
wait "$STEP" || CODE=$?
if [ -n "$SIGNALLED" ]; then
  wait "$STEP" || true # the signal ended the first wait, not the job step
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$CODE"
