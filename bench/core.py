"""CORE items per second, batched and one item at a time: `python -m bench.core`.

An untrained model answers synthetic items of each kind, with and without few-shot examples. One item at a time means
what the published system does: a batch of the item's options, with logits, losses and argmax at every position.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench import _run
from bench._common import Flags, model_config, starter_texts, time_in_turn
from bench._run import Result
from nanochat.evals.core_bundle import CoreTask, read_bundle
from nanochat.evals.core_prompts import Example, make_examples
from nanochat.evals.scoring import GPTScorer, Score, is_right
from nanochat.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer
from scripts import _cli


@dataclass
class CoreFlags(Flags):
    """Model size and number of items."""

    seq_len: int = 1024
    """Context; longer prompts are truncated."""
    items: int = 24
    """Items per task."""
    chars: int = 1_000_000
    """Characters of text to train the tokenizer on."""
    eval_bundle: str = ""
    """Folder of the CORE bundle; empty: synthetic items."""


def synthetic_tasks(items: int, seed: int = 0) -> list[CoreTask]:
    """Tasks of the three kinds, with texts about as long as in the published ones."""
    rng = random.Random(seed)
    words = " ".join(starter_texts("val", 200_000)).split()

    def text(low: int, high: int) -> str:
        start = rng.randrange(len(words) - high)
        return " ".join(words[start : start + rng.randint(low, high)])

    def choice(options: int, question: tuple[int, int], answer: tuple[int, int]) -> dict[str, Any]:
        return {
            "query": text(*question),
            "choices": [text(*answer) for _ in range(options)],
            "gold": rng.randrange(options),
        }

    def schema() -> dict[str, Any]:
        start = text(8, 16)
        return {"context_options": [f"{start} {text(1, 2)}" for _ in range(2)], "continuation": text(3, 8), "gold": 0}

    def model_text() -> dict[str, Any]:
        return {"context": text(10, 40), "continuation": text(1, 2)}

    return [
        CoreTask(
            "4 options, 10 examples",
            "multiple_choice",
            10,
            "\nAnswer: ",
            0.25,
            [choice(4, (15, 35), (3, 10)) for _ in range(items)],
        ),
        CoreTask(
            "2 options, 10 examples",
            "multiple_choice",
            10,
            "\nAnswer: ",
            0.5,
            [choice(2, (30, 60), (1, 2)) for _ in range(items)],
        ),
        CoreTask(
            "4 options, no examples",
            "multiple_choice",
            0,
            " ",
            0.25,
            [choice(4, (10, 20), (2, 8)) for _ in range(items)],
        ),
        CoreTask("schema", "schema", 0, " ", 0.5, [schema() for _ in range(items)]),
        CoreTask("continuation, 10 examples", "language_modeling", 10, " ", 0.0, [model_text() for _ in range(items)]),
        CoreTask("continuation, no examples", "language_modeling", 0, " ", 0.0, [model_text() for _ in range(items)]),
    ]


@torch.no_grad()
def one_by_one(model: GPT, examples: Sequence[Example]) -> list[list[Score]]:
    """The reference: a forward pass per item, over the batch of its options."""
    scores = []
    for example in examples:
        longest = max(len(s.ids) for s in example.sequences)
        idx = torch.tensor([[*s.ids, *[0] * (longest - len(s.ids))] for s in example.sequences])
        logits = model(idx.to(model.device)).cpu()  # (options, T, V)
        logits, targets = logits[:, :-1], idx[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(len(idx), -1)
        hits = logits.argmax(-1) == targets
        spans = [(row, slice(s.start - 1, s.end - 1)) for row, s in enumerate(example.sequences)]
        scores.append([Score(float(losses[span].double().mean()), bool(hits[span].all())) for span in spans])
    return scores


def measure(flags: CoreFlags, runtime: Runtime) -> Result:
    tokenizer = RustBPETokenizer.train_from_iterator(starter_texts("train", flags.chars), flags.vocab_size)
    model = GPT.create(model_config(flags), runtime.device, runtime.dtype)
    with torch.no_grad():  # a new model's output projections are zero
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p.device), alpha=0.02)
    scorer = GPTScorer(model)
    rows, tasks = [], {}
    total = {"batched": 0.0, "one": 0.0}
    agreed = count = 0
    tasks_to_run = read_bundle(Path(flags.eval_bundle)).tasks if flags.eval_bundle else synthetic_tasks(flags.items)
    for task in tasks_to_run:
        examples = list(make_examples(task, tokenizer, flags.seq_len, max_items=flags.items))
        both: dict[str, Callable[[], Any]] = {
            "batched": partial(scorer.score, examples),
            "one": partial(one_by_one, model, examples),
        }
        times = time_in_turn(both, flags.seconds, runtime)
        answers = [(is_right(e, a), is_right(e, b)) for e, a, b in zip(examples, both["batched"](), both["one"]())]
        agreed, count = agreed + sum(a == b for a, b in answers), count + len(answers)
        total = {name: total[name] + times[name] for name in total}
        rates = {name: len(examples) / times[name] for name in times}
        tasks[task.label] = {
            **{f"{name}_items_per_second": rate for name, rate in rates.items()},
            "ratio": rates["batched"] / rates["one"],
        }
        rows.append((task.label, f"{rates['one']:.1f}", f"{rates['batched']:.1f}", f"{tasks[task.label]['ratio']:.1f}"))
    ratio = total["one"] / total["batched"]
    rows.append(("all", f"{count / total['one']:.1f}", f"{count / total['batched']:.1f}", f"{ratio:.1f}"))
    return Result(
        "CORE items per second",
        ("task", "one at a time", "batched", "ratio"),
        rows,
        {
            "tasks": tasks,
            "items_per_second": count / total["batched"],
            "ratio": ratio,
            "same_answers_share": agreed / count,
        },
    )


def main(argv: Sequence[str] | None = None) -> int:
    return _run.run("core", CoreFlags, measure, argv)


if __name__ == "__main__":
    _cli.run(main)
