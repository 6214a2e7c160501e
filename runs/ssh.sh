#!/usr/bin/env bash
# Pretraining on several machines that ssh reaches without a password, this repository at the same path on each.
#
#   HOSTS="node1 node2" GPUS=8 bash runs/ssh.sh --depth=24 --save-every=250
#   DRY_RUN=1 HOSTS="node1 node2" bash runs/ssh.sh --depth=24          # only show what would be started
#
# The first host is where they meet. The base folder must be on a disk that all share. Ctrl-C ends ssh, and
# with its terminal torchrun on each host gets SIGHUP: the step is finished and saved, the same command goes on from it.
set -euo pipefail
cd "$(dirname "$0")/.."

read -ra NODES <<< "${HOSTS:?give HOSTS, for instance HOSTS=\"node1 node2\"}"
LINE=(env OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" ${NANOCHAT_BASE_DIR:+NANOCHAT_BASE_DIR="$NANOCHAT_BASE_DIR"}
  .venv/bin/torchrun --nnodes="${#NODES[@]}" --nproc_per_node="${GPUS:-8}" --max-restarts=3
  --rdzv-backend=c10d --rdzv-id="${RUN_ID:-nanochat}" --rdzv-endpoint="${NODES[0]}:${PORT:-29500}"
  -m scripts.base_train -- --resume "$@")

trap 'kill $(jobs -p) 2> /dev/null' INT TERM # a script's background jobs do not hear Ctrl-C
for host in "${NODES[@]}"; do
  REMOTE="cd $(printf %q "$PWD") && exec $(printf '%q ' "${LINE[@]}")"
  if [ -n "${DRY_RUN:-}" ]; then
    echo "ssh -tt $host $REMOTE"
  else
    ssh -tt "$host" "$REMOTE" < /dev/null &
  fi
done
CODE=0
for job in $(jobs -p); do
  wait "$job" || CODE=$?
done
exit "$CODE"
