"""lm-evaluation-harness on an export gives the log likelihoods and choices of base_eval, item by item."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from core_helpers import random_task
from export_helpers import CONFIGS, TOKENIZER, export, make_model

from nanochat.evals.core_prompts import make_examples
from nanochat.evals.hf_model import load_hf_model
from nanochat.evals.scoring import GPTScorer
from nanochat.runtime import Runtime

for package in ("lm_eval", "transformers", "accelerate"):
    if importlib.util.find_spec(package) is None:
        pytest.skip("needs pip install 'lm-eval[hf]'", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent.parent / "dev" / "lm_eval"))
from_core = importlib.import_module("from_core")
TASK = random_task("multiple_choice", 30, 1)


def likelihoods(folder: Path, tasks: Path, out: Path, route: str) -> list[list[float]]:
    """The harness's log likelihood of each choice of each item."""
    name = from_core.write_task(TASK, tasks)
    settings = f"pretrained={folder},dtype=float32,trust_remote_code={route == 'code'}"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", settings, "--device", "cpu"]
    command += ["--tasks", name, "--include_path", str(tasks), "--output_path", str(out), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = next(out.rglob(f"samples_{name}_*")).read_text().splitlines()
    items: list[Any] = sorted(map(json.loads, lines), key=lambda item: item["doc_id"])
    return [[float(response[0][0]) for response in item["resps"]] for item in items]


@pytest.mark.parametrize("route", CONFIGS)
@pytest.mark.filterwarnings("default")
def test_the_same_choices(route: str, tmp_path: Path) -> None:
    model = make_model(route)
    folder = export(model, tmp_path / "export")
    found = likelihoods(folder, tmp_path / "tasks", tmp_path / "out", route)
    loaded, tokenizer = load_hf_model(str(folder), Runtime.create("cpu", "float32"), route == "code")
    examples = list(make_examples(TASK, TOKENIZER, 128))
    assert [e.sequences for e in make_examples(TASK, tokenizer, 128)] == [e.sequences for e in examples]
    # As the harness has them: without the trailing blank, which goes with the choice.
    texts = [document["context"].rstrip() for document in from_core.documents(TASK, -1)]
    contexts = [TOKENIZER.encode(text, prepend="<|bos|>") for text in texts]
    compared = 0
    for scorer in (GPTScorer(model), loaded):
        scored = zip(found, examples, scorer.score(examples), contexts, strict=True)
        for theirs, example, scores, context in scored:
            counts = [s.end - s.start for s in example.sequences]
            ours = [-score.mean_loss * count for score, count in zip(scores, counts)]
            # The harness also scores tokens that all choices begin with: the same amount for each.
            shared = theirs[0] - ours[0]
            assert [a - b for a, b in zip(theirs, ours)] == pytest.approx([shared] * 4, abs=1e-3)
            if example.sequences[0].start == len(context):
                compared += 1
                assert shared == pytest.approx(0, abs=1e-3)
            means = [(value - shared) / count for value, count in zip(theirs, counts)]
            assert max(range(4), key=means.__getitem__) == min(range(4), key=lambda i: scores[i].mean_loss)
    assert compared > 30
