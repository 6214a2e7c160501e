#!/usr/bin/env bash
# Every check there is: style, types, tests, and the whole pipeline end to end at toy size.
# Installs what the tests need into .venv. `bash runs/test.sh --fast` leaves the pipeline out.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/pytest -n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder  # by files, the long ones first (tests/conftest.py)
[ "${1:-}" = "--fast" ] || bash runs/runcpu.sh --smoke
