"""Made-up CORE tasks and a bundle of them, a small model, and a tokenizer of bytes."""

import json
from pathlib import Path
from typing import Any

import torch
from stubs import stir

from nanochat.evals.core_bundle import CoreTask
from nanochat.gpt import GPT, GPTConfig

BOS = 256


class Letters:
    """A tokenizer of bytes: token spans are character spans."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def get_bos_token_id(self) -> int:
        return BOS


def task(kind: str, items: list[dict[str, Any]], shots: int = 0, delimiter: str = " ") -> CoreTask:
    return CoreTask("t", kind, shots, delimiter, 0.25, items)


def small_model(config: GPTConfig) -> GPT:
    """A model with noise in every weight, so that no output is trivially zero."""
    return stir(GPT.create(config, seed=3), 0.05)


def random_task(kind: str, count: int, shots: int) -> CoreTask:
    """A task of `count` items of random letters, the same for the same kind."""
    draw = torch.Generator().manual_seed(len(kind))

    def text(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (), generator=draw))
        return "".join(chr(97 + int(c)) for c in torch.randint(20, (length,), generator=draw))

    items = []
    for _ in range(count):
        if kind == "multiple_choice":
            items.append({"query": text(5, 60), "choices": [text(1, 9) for _ in range(4)], "gold": 2})
        elif kind == "schema":
            items.append({"context_options": [text(5, 60) for _ in range(2)], "continuation": text(2, 9), "gold": 0})
        else:
            items.append({"context": text(5, 60), "continuation": text(1, 3), "category": "letters"})
    return task(kind, items, shots)


def write_bundle(folder: Path) -> Path:
    """Write a CORE bundle of three tasks, one per kind; returns `folder`."""
    (folder / "eval_data").mkdir(parents=True)
    (folder / "core.yaml").write_text(
        "icl_tasks:\n"
        "- {label: pick, dataset_uri: pick.jsonl, num_fewshot: [2], icl_task_type: multiple_choice,"
        ' continuation_delimiter: "\\nAnswer: "}\n'
        "- {label: pronoun, dataset_uri: pronoun.jsonl, num_fewshot: [0], icl_task_type: schema}\n"
        "- {label: go_on, dataset_uri: go_on.jsonl, num_fewshot: [1], icl_task_type: language_modeling,"
        " has_categories: true}\n"
    )
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\npick,25\npronoun,50\ngo_on,0\n")
    data = {
        "pick": random_task("multiple_choice", 6, 0),
        "pronoun": random_task("schema", 5, 0),
        "go_on": random_task("language_modeling", 4, 0),
    }
    for name, t in data.items():
        (folder / "eval_data" / f"{name}.jsonl").write_text("".join(json.dumps(i) + "\n" for i in t.items))
    return folder
