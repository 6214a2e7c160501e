#!/usr/bin/env bash
# A series of models that differ in depth only, all trained on the same number of tokens per parameter.
#
#   bash runs/miniseries.sh           # on two CPU cores, on the starter corpus: under an hour
#   bash runs/miniseries.sh h100      # on 8xH100, on 100 public shards (10 GB), which it downloads
#
# It can be stopped at any time; the same command continues where it stopped. Finished runs are not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
source .venv/bin/activate 2>/dev/null || { echo "error: no .venv here; run bash runs/runcpu.sh --smoke first" >&2; exit 2; }

case "${1:-cpu}" in
  cpu)
    DEPTHS="1 2 3" RATIO=3
    FLAGS="--data=starter --recipe=small --head-dim=64 --max-seq-len=512 --total-batch-size=4096 --eval-tokens=262144"
    TRAIN="python -m scripts.base_train" VOCAB="--data=starter --vocab-size=4096 --max-chars=20000000" OUT=cpu ;;
  h100)
    DEPTHS="10 11 12 13 14 15 16 17 18 19 20" RATIO=10.5 FLAGS="--data=climbmix --recipe=later"
    TRAIN="torchrun --standalone --nproc_per_node=8 -m scripts.base_train --" VOCAB="--data=climbmix" OUT=h100 SHARDS=100 ;;
  *) echo "error: unknown preset $1; usage: bash runs/miniseries.sh [cpu|h100]" >&2; exit 2 ;;
esac

export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/studies/$OUT"
[ -z "${SHARDS:-}" ] || python -m nanochat.dataset --set climbmix -n "$SHARDS"
[ -f "$NANOCHAT_BASE_DIR/tokenizer/tokenizer.json" ] || python -m scripts.tok_train $VOCAB
for depth in $DEPTHS; do
  tag="series_d${depth}"
  if [ -f "$NANOCHAT_BASE_DIR/.done/$tag" ]; then echo "== $tag: already done"; continue; fi
  echo "== $tag"
  $TRAIN --resume --model-tag="$tag" --depth="$depth" --target-param-data-ratio="$RATIO" $FLAGS \
    --eval-every=-1 --sample-every=-1 --save-every=500 --keep-last=1
  mkdir -p "$NANOCHAT_BASE_DIR/.done" && touch "$NANOCHAT_BASE_DIR/.done/$tag"
done
python -m scripts.fit_law --no-fit --runs='series_*' --out="$NANOCHAT_BASE_DIR/miniseries"
