#!/usr/bin/env bash
# The best model size and number of tokens for a compute budget: train a grid of budgets and depths, fit a law.
#
#   bash runs/scaling_laws.sh           # on two CPU cores, on the starter corpus: one to two hours
#   bash runs/scaling_laws.sh h100      # on 8xH100, on 300 public shards (30 GB), which it downloads
#
# It can be stopped at any time; the same command continues where it stopped. Finished runs are not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
source .venv/bin/activate 2>/dev/null || { echo "error: no .venv here; run bash runs/runcpu.sh --smoke first" >&2; exit 2; }

case "${1:-cpu}" in
  cpu)
    GRID="4e12:1,2,3 1.2e13:1,2,3,4 3.6e13:1,2,3,4,5 1e14:2,3,4,5 3e14:3,4,5"
    FLAGS="--data=starter --recipe=small --head-dim=64 --max-seq-len=512 --total-batch-size=4096 --eval-tokens=262144"
    TRAIN="python -m scripts.base_train" VOCAB="--data=starter --vocab-size=4096 --max-chars=20000000" OUT=cpu ;;
  h100)
    GRID="1e18:8,10,12,14,16 2.15e18:8,10,12,14,16,18 4.64e18:10,12,14,16,18,20 1e19:10,12,14,16,18,20"
    FLAGS="--data=climbmix --recipe=later" TRAIN="torchrun --standalone --nproc_per_node=8 -m scripts.base_train --" VOCAB="--data=climbmix" OUT=h100 SHARDS=300 ;;
  *) echo "error: unknown preset $1; usage: bash runs/scaling_laws.sh [cpu|h100]" >&2; exit 2 ;;
esac

export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/studies/$OUT"
[ -z "${SHARDS:-}" ] || python -m nanochat.dataset --set climbmix -n "$SHARDS"
[ -f "$NANOCHAT_BASE_DIR/tokenizer/tokenizer.json" ] || python -m scripts.tok_train $VOCAB
for cell in $GRID; do
  budget="${cell%%:*}"
  for depth in $(echo "${cell#*:}" | tr ',' ' '); do
    tag="law_${budget}_d${depth}"
    if [ -f "$NANOCHAT_BASE_DIR/.done/$tag" ]; then echo "== $tag: already done"; continue; fi
    echo "== $tag"
    $TRAIN --resume --model-tag="$tag" --depth="$depth" --target-flops="$budget" $FLAGS \
      --eval-every=-1 --sample-every=-1 --save-every=500 --keep-last=1
    mkdir -p "$NANOCHAT_BASE_DIR/.done" && touch "$NANOCHAT_BASE_DIR/.done/$tag"
  done
done
python -m scripts.fit_law --runs='law_*' --out="$NANOCHAT_BASE_DIR/scaling_laws"
