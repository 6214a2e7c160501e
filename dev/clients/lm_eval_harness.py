"""lm-evaluation-harness: log likelihoods and greedy text through /v1/completions."""

import os
import subprocess
import sys
from pathlib import Path

from cells import API, MODEL, check, run

TASKS = Path(__file__).resolve().parent.parent / "lm_eval"


def chat():
    model = f"model={MODEL},base_url={API}/completions,max_length=511,num_concurrent=4,tokenized_requests=False"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", model]
    tasks = ["--tasks", "sums_choice,sums_generate", "--include_path", str(TASKS), "--limit", "8", "--batch_size", "4"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, *tasks], cwd=TASKS, env=environment, capture_output=True, text=True, timeout=300)
    check(done.returncode == 0 and "sums_choice" in done.stdout, done.stderr[-800:])


run(globals())
