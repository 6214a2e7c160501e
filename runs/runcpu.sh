#!/usr/bin/env bash
# From raw text to a chat on this machine, with no internet after the installation.
#
#   bash runs/runcpu.sh                # about 15 minutes on any machine
#   bash runs/runcpu.sh --minutes=60   # a better model; after a first run only in a new or emptied base folder
#   bash runs/runcpu.sh --smoke        # every stage at toy size, to check that all of it runs
#
# Finished stages are skipped; an interrupted one continues where it stopped.
# Everything is written to NANOCHAT_BASE_DIR. Delete that folder to start over.
set -euo pipefail
cd "$(dirname "$0")/.."

MINUTES=15 SMOKE=""
for arg in "$@"; do
  case "$arg" in
    --minutes=*) MINUTES="${arg#*=}" ;;
    --smoke) SMOKE=1 ;;
    *) echo "error: unknown argument $arg; usage: bash runs/runcpu.sh [--minutes=15] [--smoke]" >&2; exit 2 ;;
  esac
done
if ! [[ "$MINUTES" =~ ^[0-9]+([.][0-9]+)?$ ]] || [[ "$MINUTES" =~ ^0+([.]0+)?$ ]]; then
  echo "error: --minutes takes a positive number, got '$MINUTES'" >&2; exit 2
fi

[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -c 'import nanochat, torch, tyro, tiktoken, rustbpe, pyarrow, rich, matplotlib' 2>/dev/null || .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
source .venv/bin/activate
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"

# The share of the minutes each long stage gets; the rest goes to the tokenizer and the evaluations.
share() { python -c "print(round(float('$MINUTES') * $1, 3))"; }
if [ -n "$SMOKE" ]; then
  export NANOCHAT_BASE_DIR="$(mktemp -d)"
  trap 'rm -rf "$NANOCHAT_BASE_DIR"' EXIT
  VOCAB=1024 CHARS=1000000 CONTEXT=128 DEPTH=2 BATCH=1024 SPLIT=4096
  BASE="--num-iterations=20 --eval-tokens=4096" SFT="--num-iterations=20 --eval-tokens=4096" EVAL="-x 8 -m 32"
  RL="--num-iterations=2 --examples-per-step=2 --num-samples=4 --max-new-tokens=16 --eval-examples=4"
else
  VOCAB=4096 CHARS=20000000 CONTEXT=512 DEPTH=-1 BATCH=4096 SPLIT=65536
  BASE="--minutes=$(share 0.36) --eval-every=150 --save-every=500 --eval-tokens=32768"
  SFT="--minutes=$(share 0.38) --eval-every=300 --save-every=500 --eval-tokens=32768" EVAL="-x 200"
  RL="--minutes=$(share 0.10) --init-lr-frac=0.02 --examples-per-step=24 --max-new-tokens=64 --eval-every=50 --save-every=50"
fi
done_file() { [ -f "$NANOCHAT_BASE_DIR/.done/$1" ]; }
stage() {  # stage NAME COMMAND...: run it once
  local name="$1"; shift
  if done_file "$name"; then echo "== $name: already done"; return; fi
  echo "== $name"
  "$@"
  mkdir -p "$NANOCHAT_BASE_DIR/.done" && touch "$NANOCHAT_BASE_DIR/.done/$name"
}

# A base model that was begun keeps the minutes it began with.
if ! (cd "$NANOCHAT_BASE_DIR/base_checkpoints/cpu" 2>/dev/null && compgen -G "[0-9]*" >/dev/null); then
  mkdir -p "$NANOCHAT_BASE_DIR/.done" && share 1.0 > "$NANOCHAT_BASE_DIR/.done/minutes"
fi
EARLIER="$(cat "$NANOCHAT_BASE_DIR/.done/minutes" 2>/dev/null || true)"
if [ -n "$EARLIER" ] && [ "$(share 1.0)" != "$EARLIER" ]; then
  echo "note: the base model there was begun with --minutes=$EARLIER and stays; delete $NANOCHAT_BASE_DIR to start over, or set NANOCHAT_BASE_DIR"
fi
stage tok_train  python -m scripts.tok_train --data=starter --vocab-size=$VOCAB --max-chars=$CHARS
# The small recipe at every depth: it was made for short runs.
stage base_train python -m scripts.base_train --resume --data=starter --model-tag=cpu --recipe=small --depth=$DEPTH --head-dim=64 \
  --max-seq-len=$CONTEXT --total-batch-size=$BATCH --sample-every=-1 $BASE
stage base_eval  python -m scripts.base_eval --data=starter --split-tokens=$SPLIT
stage chat_sft   python -m scripts.chat_sft --resume --model-tag=cpu --total-batch-size=$BATCH --init-lr-frac=2 $SFT
stage chat_eval  python -m scripts.chat_eval -i sft $EVAL
# Answerable: RL on the other tasks alone makes the model decline more questions that it can answer.
stage chat_rl    python -m scripts.chat_rl --resume --model-tag=cpu --tasks=WordProblems,LetterCounting,Spelling,Arithmetic,Identity,Answerable $RL
stage chat_eval_rl python -m scripts.chat_eval -i rl $EVAL

echo "== four questions to your model"
for question in "Hello! Who are you?" "What is 12 + 30?" "Anna has 12 apples. She buys 7 more. How many apples does Anna have now?" "Tell me a short story about a dog."; do
  echo "> $question"
  python -m scripts.chat_cli -i rl --prompt "$question"
done
python -m scripts.report
if [ -n "$SMOKE" ]; then
  echo "all stages ran; the toy model and its report are deleted again"
else
  echo "talk to it:  source .venv/bin/activate && python -m scripts.chat_cli -i rl"
fi
