#!/usr/bin/env bash
# Pretraining on several machines that ssh reaches without a password, this repository at the same path on each.
#
#   HOSTS="node1 node2" GPUS=8 bash runs/ssh.sh --data=climbmix --depth=24 --save-every=250 --timeout=300
#   DRY_RUN=1 HOSTS="node1 node2" bash runs/ssh.sh --depth=24          # only print the commands
#
# The first host runs the rendezvous. The base folder must be on a disk that all share. When a host is lost the others
# continue from the last save; it is retried until it returns, and joins them. Ctrl-C ends ssh, and the launcher on each
# host gets SIGHUP with its terminal: the run finishes its step and saves, and the same command continues it.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${HOSTS:?give HOSTS, for instance HOSTS=\"node1 node2\"}"
read -ra NODES <<< "${HOSTS//$'\n'/ }"
LINE=(env OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" ${NANOCHAT_BASE_DIR:+NANOCHAT_BASE_DIR="$NANOCHAT_BASE_DIR"}
  .venv/bin/python -m scripts.launch --nnodes="1:${#NODES[@]}" --nproc_per_node="${GPUS:-8}" --max-restarts="${MAX_RESTARTS:-3}"
  --rdzv-backend=c10d --rdzv-id="${RUN_ID:-nanochat}" --rdzv-endpoint="${NODES[0]}:${PORT:-29500}"
  -m scripts.base_train -- --resume "$@")
REMOTE="cd $(printf %q "$PWD") && exec $(printf '%q ' "${LINE[@]}")"

keep() { # run the launcher on one host, again while ssh (255) or the network between the hosts (75) fails
  local code try
  for ((try = 0; try < ${TRIES:-100}; try++)); do
    code=0
    ssh -tt "$1" "$REMOTE" < /dev/null & trap "kill $! 2> /dev/null; wait $!; exit 143" TERM
    wait $! || code=$?
    [ "$code" = 75 ] || [ "$code" = 255 ] || break
    [ -z "${FIRST:-}" ] || kill -0 "$FIRST" 2> /dev/null || break # the first host's launcher has exited: the run has ended
    sleep "${PAUSE:-30}" & wait $!
  done
  exit "$code"
}

trap 'kill $(jobs -p) 2> /dev/null' INT TERM # a script's background jobs do not get Ctrl-C
for host in "${NODES[@]}"; do
  if [ -n "${DRY_RUN:-}" ]; then
    echo "ssh -tt $host $REMOTE"
  else
    keep "$host" &
    FIRST="${FIRST:-$!}"
  fi
done
CODE=0
[ -n "${DRY_RUN:-}" ] || wait "$FIRST" || CODE=$?
wait
exit "$CODE" # of the first host
