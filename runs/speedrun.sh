#!/usr/bin/env bash
# All stages on one node of 8xH100: a d24 model in 1.65 hours, then finetuning and evaluation. Recipe, sizes and text are
# those of the published run that reached 0.718 bits per byte and 0.263 CORE in that time. Its plan:
#
#   python -m scripts.plan --depth=24 --recipe=later --target-param-data-ratio=8 --fp8 --gpu=h100 --num-gpus=8
#
#   bash runs/speedrun.sh
#   WANDB_RUN=speedrun bash runs/speedrun.sh        # with curves on wandb (pip install -e '.[wandb]')
#
# After an interruption the same command continues from the last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -x .venv/bin/python ] || python3 -m venv .venv
source .venv/bin/activate
python -m pip install --quiet -c constraints.txt -e '.[torchao,fa3]'
export OMP_NUM_THREADS=1
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
RUN="${WANDB_RUN:-dummy}" GPUS="${GPUS:-8}"

# First enough text for the tokenizer; the rest is downloaded while the tokenizer trains.
python -m nanochat.dataset --set climbmix -n 8
python -m nanochat.dataset --set climbmix -n 170 & DOWNLOAD=$!
trap 'kill $DOWNLOAD 2>/dev/null || true' EXIT  # Ctrl-C does not reach a script's background job
if [ ! -f "$NANOCHAT_BASE_DIR/.done/speedrun_tokenizer" ]; then  # with more shards there it would be another one
  python -m scripts.tok_train --data=climbmix --max-chars=2000000000
  mkdir -p "$NANOCHAT_BASE_DIR/.done" && touch "$NANOCHAT_BASE_DIR/.done/speedrun_tokenizer"
  python -m scripts.tok_eval
fi
wait $DOWNLOAD
trap - EXIT

torchrun --standalone --nproc_per_node="$GPUS" -m scripts.base_train -- --resume \
  --data=climbmix --depth=24 --recipe=later --target-param-data-ratio=8 --fp8 --save-every=1000 --run="$RUN"
torchrun --standalone --nproc_per_node="$GPUS" -m scripts.base_eval -- --model-tag=d24 --data=climbmix --eval=bpb,sample
torchrun --standalone --nproc_per_node="$GPUS" -m scripts.chat_sft -- --resume --model-tag=d24 --data=published --run="$RUN"
torchrun --standalone --nproc_per_node="$GPUS" -m scripts.chat_eval -- -i sft --model-tag=d24
python -m scripts.report
