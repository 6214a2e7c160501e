"""lm-evaluation-harness against a running server: same scores as for the same items in process."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from live import Live
from serve_helpers import MODEL, TOKENIZER, app_of

from nanochat.engine import Engine
from nanochat.serve.api import Settings

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("no lm_eval: pip install 'lm-eval[api]'", allow_module_level=True)

TASKS = Path(__file__).parent.parent / "dev" / "lm_eval"
CONTEXT = MODEL.config.sequence_len


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with Live(app_of(Settings())) as made:
        yield made


def run(live: Live, out: Path, as_text: bool) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """(scores by task, items by task), from the harness, run offline in a process of its own."""
    arguments = ",".join(
        [
            "model=nanochat",
            f"base_url={live.url}/v1/completions",
            f"max_length={CONTEXT - 1}",
            "num_concurrent=4",
            f"tokenized_requests={not as_text}",
        ]
    )
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "local-completions",
        "--model_args",
        arguments,
        "--tasks",
        "sums_choice,sums_generate",
        "--include_path",
        str(TASKS),
        "--output_path",
        str(out),
        "--log_samples",
        "--batch_size",
        "8" if as_text else "1",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "cache")}
    done = subprocess.run(command, cwd=TASKS, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("results_*.json")
    items = {
        task: [json.loads(line) for line in next(out.rglob(f"samples_{task}_*")).read_text().splitlines()]
        for task in ("sums_choice", "sums_generate")
    }
    return json.loads(results.read_text())["results"], items


@torch.inference_mode()
def log_likelihood(context: str, continuation: str) -> float:
    """Log likelihood by a plain forward pass, from <|bos|> on."""
    before = TOKENIZER.encode(context)
    ids = [TOKENIZER.encode_special("<|bos|>"), *TOKENIZER.encode(context + continuation)]
    logprobs = MODEL(torch.tensor([ids])).float().log_softmax(-1)[0]
    return sum(float(logprobs[i - 1, ids[i]]) for i in range(len(before) + 1, len(ids)))


@pytest.mark.parametrize("as_text", [False, True], ids=["ids", "text"])
def test_scores_equal_those_in_process(live: Live, tmp_path: Path, as_text: bool) -> None:
    """As token ids one by one, and as text in batches."""
    scores, items = run(live, tmp_path, as_text)
    right = 0
    for item in items["sums_choice"]:
        expected = [log_likelihood(item["doc"]["question"], f" {option}") for option in item["doc"]["options"]]
        assert [float(response[0][0]) for response in item["resps"]] == pytest.approx(expected, abs=1e-3)
        right += max(range(4), key=expected.__getitem__) == item["doc"]["gold"]
    assert scores["sums_choice"]["acc,none"] == pytest.approx(right / 60) and len(items["sums_choice"]) == 60
    engine = Engine(MODEL, TOKENIZER)
    for item in items["sums_generate"]:
        prompt = [TOKENIZER.encode_special("<|bos|>"), *TOKENIZER.encode(item["doc"]["question"])]
        ids, _ = engine.generate_batch(prompt, 1, max_tokens=12, temperature=0.0)
        text = TOKENIZER.decode(ids[0][len(prompt) :])
        expected_text = text.partition("\n")[0].partition(",")[0]
        assert item["resps"][0][0] == expected_text
    assert len(items["sums_generate"]) == 60
