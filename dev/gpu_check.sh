#!/usr/bin/env bash
# The first hour on a card: check every stage, measure, print a table. Needs no network.
#
#   bash dev/gpu_check.sh                     # everything; about half an hour on a new GPU
#   bash dev/gpu_check.sh --minutes=9         # the most useful steps first, as many as fit
#   bash dev/gpu_check.sh --only=train_d24    # some steps or groups; --list names them, --help says the rest
#
# Uses .venv if there is one, else python3 with whatever is on PYTHONPATH; PYTHON=... chooses another.
set -euo pipefail
ROOT="$(cd "$(dirname "$0")/.." && pwd)"

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ ! -x "$ROOT/.venv/bin/python" ] || PYTHON="$ROOT/.venv/bin/python"
fi
PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -m dev.gpu_check "$@"
