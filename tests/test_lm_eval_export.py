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
from_core, core_choice = (importlib.import_module(name) for name in ("from_core", "core_choice"))
TASK = random_task("multiple_choice", 30, 1)


def harness(folder: Path, name: str, tasks: Path, out: Path, route: str) -> list[Any]:
    """The harness's log of each item, in the order of the documents."""
    settings = f"pretrained={folder},dtype=float32,trust_remote_code={route == 'code'}"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", settings, "--device", "cpu"]
    command += ["--tasks", name, "--include_path", str(tasks), "--output_path", str(out), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = next(out.rglob(f"samples_{name}_*")).read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda item: item["doc_id"])


@pytest.mark.parametrize("route", CONFIGS)
@pytest.mark.filterwarnings("default")
def test_the_same_choices(route: str, tmp_path: Path) -> None:
    model = make_model(route)
    folder = export(model, tmp_path / "export")
    documents = from_core.documents(TASK, TOKENIZER, 128)
    assert len(documents) >= 28 and any(document["choices"][-1] == "" for document in documents)
    name = from_core.write_task(TASK, tmp_path / "tasks", documents)
    items = harness(folder, name, tmp_path / "tasks", tmp_path / "out", route)
    loaded, tokenizer = load_hf_model(str(folder), Runtime.create("cpu", "float32"), route == "code")
    examples = list(make_examples(TASK, TOKENIZER, sys.maxsize))
    assert [e.sequences for e in make_examples(TASK, tokenizer, sys.maxsize)] == [e.sequences for e in examples]
    by_text = {example.texts[0]: example for example in examples}
    same = [by_text[document["context"] + document["choices"][0]] for document in documents]
    for scorer in (GPTScorer(model), loaded):
        for item, document, example, scores in zip(items, documents, same, scorer.score(same), strict=True):
            theirs = [float(response[0][0]) for response in item["resps"]]
            blank = theirs.pop() if document["choices"][-1] == "" else 0.0
            counts = [s.end - s.start for s in example.sequences]
            ours = [-score.mean_loss * count for score, count in zip(scores, counts)]
            assert [value - blank for value in theirs] == pytest.approx(ours, abs=1e-3)
            choice = min(range(4), key=lambda i: scores[i].mean_loss)
            assert core_choice.chosen(document, [*theirs, blank][: len(document["choices"])]) == choice
            assert item["acc"] == (choice == example.gold)
