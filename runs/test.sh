#!/usr/bin/env bash
# Every check there is: style, types, tests, the whole pipeline end to end at toy size, and the check of a GPU on this CPU.
# Installs what the tests need into .venv. `bash runs/test.sh --fast` leaves the last two out.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/pytest -n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder  # by files, the long ones first (tests/conftest.py)
[ "${1:-}" != "--fast" ] || exit 0
bash runs/runcpu.sh --smoke
CHECK="$(mktemp -d)" && trap 'rm -rf "$CHECK"' EXIT
CUDA_VISIBLE_DEVICES="" bash dev/gpu_check.sh --out="$CHECK"  # on a CPU, so that it still works when a GPU is there
