"""The CORE metric (DCLM, arXiv 2406.11794): the mean over 22 tasks of (accuracy - chance) / (1 - chance).

The model's choice among an item's options is the one with the lowest mean loss of its scored tokens. A language
modeling item is right if every scored token has the highest logit. evals/core_prompts.py builds the sequences,
evals/scoring.py scores them.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from statistics import mean
from typing import Any

import numpy as np
import torch

from nanochat.evals.core_bundle import Bundle, CoreTask
from nanochat.evals.core_prompts import TextEncoder, make_examples
from nanochat.evals.scoring import Scorer, is_right
from nanochat.runtime import Runtime

WINDOW_EXAMPLES = 512  # scored per call, so that batches have similar lengths
BOOTSTRAP = 1000


@dataclass
class TaskResult:
    """The result of one task."""

    label: str
    groups: list[list[bool]]  # whether each item is right; by category, if the accuracy is the mean over categories
    baseline: float
    size: int = 0  # of the task's items, of which the first may have been evaluated
    cropped: int = 0  # items whose prompt exceeded the context
    examples: list[dict[str, Any]] = field(default_factory=list)  # a few, to read

    @property
    def right(self) -> list[bool]:
        return [right for group in self.groups for right in group]

    @property
    def accuracy(self) -> float:
        return mean(sum(group) / len(group) for group in self.groups)

    @property
    def centered(self) -> float:
        return centered(self.accuracy, self.baseline)

    @property
    def standard_error(self) -> float:
        """Of the accuracy, bootstrapped."""
        return float(bootstrap_means(self.groups, np.random.default_rng(0)).std())


@dataclass
class CoreResult:
    """The results of all tasks. `core` is the mean over those evaluated; `missing` lists the others."""

    tasks: list[TaskResult]
    missing: list[str]
    mode: str
    baselines: str
    core: float
    low: float  # 95% interval, bootstrapped over the items
    high: float
    seconds: float

    @property
    def scope(self) -> str:
        """What the mean is of, if not of all of CORE: `18 of 22 tasks, first 500 items of each`; else empty."""
        evaluated, published = {t.label for t in self.tasks}, set(published_gpt2()["baseline_percent"])
        first = max((len(t.right) for t in self.tasks if len(t.right) < t.size), default=0)
        tasks = f"{len(evaluated)} of {len(published)} tasks"
        if not evaluated <= published:
            tasks = f"{len(evaluated)} tasks of another bundle"
        parts = [tasks if evaluated != published else "", f"first {first} items of each" if first else ""]
        return ", ".join(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, without the single items."""
        return {
            "core_metric": self.core,
            "core_interval": [self.low, self.high],
            "partial": bool(self.scope),
            "scope": self.scope,
            "missing": self.missing,
            "mode": self.mode,
            "baselines": self.baselines,
            "tasks": {
                t.label: {
                    "accuracy": t.accuracy,
                    "centered": t.centered,
                    "items": len(t.right),
                    "standard_error": t.standard_error,
                    "chance": t.baseline,
                    "cropped": t.cropped,
                }
                for t in self.tasks
            },
        }


def centered(accuracy: Any, baseline: float) -> Any:
    """(accuracy - chance) / (1 - chance): 0 for guessing, 1 for all right, negative below chance."""
    return (accuracy - baseline) / (1 - baseline)


def published_gpt2() -> dict[str, Any]:
    """Published GPT-2 results: {"accuracy": {model: {task: accuracy}}, "baseline_percent": {task: v1 chance}}."""
    return json.loads(resources.files("nanochat.evals").joinpath("core_gpt2.json").read_text(encoding="utf-8"))


def bootstrap_means(groups: Sequence[Sequence[bool]], rng: np.random.Generator) -> np.ndarray:
    """(BOOTSTRAP,) accuracies of the items resampled with replacement, within each group."""
    # Resampling items that are right or wrong is drawing the number of right ones.
    draws = [rng.binomial(len(group), sum(group) / len(group), BOOTSTRAP) / len(group) for group in groups]
    return np.mean(draws, axis=0)


def evaluate_task(
    scorer: Scorer,
    task: CoreTask,
    tokenizer: TextEncoder,
    runtime: Runtime,
    *,
    max_items: int = -1,
    mode: str = "reference",
    num_examples: int = 2,
) -> TaskResult:
    """Accuracy on a task's items, split over the ranks; keeps the first `num_examples` to read. Collective."""
    items = list(enumerate(make_examples(task, tokenizer, scorer.max_tokens, max_items=max_items, mode=mode)))
    own = items[runtime.rank :: runtime.world_size]
    outcome = torch.zeros(2, len(items), dtype=torch.float32)  # right, cropped
    kept = []
    for start in range(0, len(own), WINDOW_EXAMPLES):
        window = own[start : start + WINDOW_EXAMPLES]
        for (number, example), scores in zip(window, scorer.score([example for _, example in window]), strict=True):
            right = is_right(example, scores)
            outcome[0, number], outcome[1, number] = right, example.cropped
            if number < num_examples:
                losses = [score.mean_loss for score in scores]
                kept.append({"prompt": example.texts[0], "gold": example.gold, "right": right, "losses": losses})
    outcome = runtime.all_reduce_sum(outcome.to(runtime.device), "summing CORE results").cpu()
    groups: dict[str, list[bool]] = {}
    for (_, example), right in zip(items, outcome[0].tolist()):
        groups.setdefault(example.category, []).append(bool(right))
    cropped = int(outcome[1].sum())
    return TaskResult(task.label, list(groups.values()), task.baseline, len(task.items), cropped, kept)


def evaluate_core(
    scorer: Scorer,
    tokenizer: TextEncoder,
    bundle: Bundle,
    runtime: Runtime,
    *,
    max_per_task: int = -1,
    mode: str = "reference",
    baselines: str = "v1",
    progress: Callable[[TaskResult, float], None] = lambda result, seconds: None,
) -> CoreResult:
    """CORE of a model. `progress` is called after each task with its result and its time in seconds. Collective."""
    started, results = time.perf_counter(), []
    for task in bundle.tasks:
        began = time.perf_counter()
        results.append(evaluate_task(scorer, task, tokenizer, runtime, max_items=max_per_task, mode=mode))
        progress(results[-1], time.perf_counter() - began)
    return summarize(results, bundle.missing + bundle.left_out, mode, baselines, time.perf_counter() - started)


def summarize(results: list[TaskResult], missing: list[str], mode: str, baselines: str, seconds: float) -> CoreResult:
    """The metric and its interval, each task's items resampled independently."""
    rng = np.random.default_rng(0)
    draws = np.stack([centered(bootstrap_means(r.groups, rng), r.baseline) for r in results])  # (tasks, BOOTSTRAP)
    low, high = np.quantile(draws.mean(0), (0.025, 0.975))
    core = sum(r.centered for r in results) / len(results)
    return CoreResult(results, missing, mode, baselines, core, float(low), float(high), seconds)
