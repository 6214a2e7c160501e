"""A small base_train run started by scripts.launch: its flags, environment, metrics and ranks."""

import json
import os
from pathlib import Path

from nanochat.checkpoint_manager import run_dir

ROOT = Path(__file__).parent.parent
FLAGS = [
    "--depth=1",
    "--n-embd=16",
    "--head-dim=8",
    "--max-seq-len=16",
    "--total-batch-size=64",
    "--eval-tokens=64",
    "--eval-every=-1",
    "--sample-every=-1",
    "--device-type=cpu",
    "--save-every=5",
    "--model-tag=launched",
    "--resume",
]


def folder(base: Path) -> Path:
    return run_dir(base, "base", "launched")


def environment(base: Path) -> dict[str, str]:
    settings = {"OMP_NUM_THREADS": "1", "NANOCHAT_BASE_DIR": str(base), "NANOCHAT_DTYPE": "float32"}
    return {**os.environ, **settings, "PYTHONPATH": str(ROOT)}


def metrics(base: Path) -> list[dict[str, float]]:
    """The complete lines of metrics.jsonl."""
    path = folder(base) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
