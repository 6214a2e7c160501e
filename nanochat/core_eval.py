"""The CORE metric (DCLM, arXiv 2406.11794): the mean over 22 tasks of (accuracy - chance) / (1 - chance).

An option's score is the mean loss of its scored tokens; the lowest is the model's choice. An item of language modeling
is right when every scored token is the likeliest. core_prompts.py makes the sequences; here they are scored, many at
a time, and what options share is computed once.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from nanochat.data.batches import by_length
from nanochat.evals.core_bundle import Bundle, CoreTask
from nanochat.evals.core_prompts import Example, Scored, TextEncoder, common_prefix, make_examples
from nanochat.gpt import GPT
from nanochat.inference.kv_cache import KVCache
from nanochat.loss_head import head_logits
from nanochat.runtime import Runtime

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}  # padding included: what fits a CPU's caches, or fills a GPU
SAVED_TOKENS = 256  # of an item; if its options share less than that, reading them whole is faster than a cache
CACHED_ROWS = 32  # options of several items that are continued together
WINDOW_EXAMPLES = 512  # that are sorted by length together
BOOTSTRAP = 1000


class Score(NamedTuple):
    """What the model makes of a sequence's scored tokens."""

    mean_loss: float  # nats
    greedy: bool  # each of them the likeliest


class Scorer(Protocol):
    """Something that scores examples: a nanochat model, or any other behind the same two lines."""

    max_tokens: int

    def score(self, examples: Sequence[Example]) -> list[list[Score]]: ...


# ---------------------------------------------------------------------------------------------------
# Scoring


class GPTScorer:
    """Scores with a nanochat model. Only the scored tokens go through the output head."""

    def __init__(self, model: GPT, batch_tokens: int | None = None) -> None:
        self.model, self.batch_tokens = model, batch_tokens or BATCH_TOKENS.get(model.device.type, 8192)
        self.max_tokens = model.config.sequence_len

    @torch.no_grad()
    def score(self, examples: Sequence[Example]) -> list[list[Score]]:
        """Scores of each example's sequences, in order."""
        was_training = self.model.training
        self.model.eval()
        try:
            return self._score(examples)
        finally:
            self.model.train(was_training)

    def _score(self, examples: Sequence[Example]) -> list[list[Score]]:
        found: list[list[Score | None]] = [[None] * len(example.sequences) for example in examples]
        whole: list[tuple[int, int]] = []  # (example, option) whose sequences are read from their beginning
        shared: list[tuple[int, int]] = []  # (tokens in common, example)
        for i, example in enumerate(examples):
            common = shared_tokens(example)
            if common * (len(example.sequences) - 1) >= SAVED_TOKENS:
                shared.append((common, i))
            else:
                whole += [(i, j) for j in range(len(example.sequences))]
        lengths = [len(examples[i].sequences[j].ids) for i, j in whole]
        for numbers in by_length(lengths, self.batch_tokens):
            batch = [whole[n] for n in numbers]
            for (i, j), score in zip(batch, self._score_whole([examples[i].sequences[j] for i, j in batch])):
                found[i][j] = score
        shared.sort()
        while shared:
            group: list[tuple[int, int]] = []
            rows = 0
            while shared and (not group or rows + len(examples[shared[-1][1]].sequences) <= CACHED_ROWS):
                group.append(shared.pop())
                rows += len(examples[group[-1][1]].sequences)
            scores = iter(self._score_shared([(examples[i].sequences, common) for common, i in group]))
            for _, i in group:
                found[i] = [next(scores) for _ in examples[i].sequences]
        return found  # type: ignore[return-value]

    def _score_whole(self, sequences: Sequence[Scored]) -> list[Score]:
        """Sequences of about one length, padded at their ends, where causal attention does not see it."""
        x = self.model.hidden(self._padded([s.ids for s in sequences]))  # (B, T, C)
        return self._read(x, sequences, [0] * len(sequences))

    def _score_shared(self, items: Sequence[tuple[Sequence[Scored], int]]) -> list[Score]:
        """Items whose options begin with the same tokens, so many: those once, into a cache, then the rest of each."""
        model = self.model
        # The last shared token goes with the rests: it foretells the first of them.
        options = [(s, common - 1) for sequences, common in items for s in sequences]
        rests = [s.ids[start:] for s, start in options]
        longest = max(start for _, start in options) + max(map(len, rests))
        like = {"device": model.device, "dtype": model.compute_dtype}
        cache = KVCache(model.config, len(options), longest, num_rows=0, **like)  # type: ignore[arg-type]
        for sequences, common in items:
            beginning = KVCache(model.config, 1, common, **like)  # type: ignore[arg-type]
            model.prefill(self._padded([sequences[0].ids[: common - 1]]), beginning)
            for _ in sequences:
                cache.join(beginning)
        x = model.hidden(self._padded(rests), cache)  # (B, T, C)
        return self._read(x, [s for s, _ in options], [start for _, start in options])

    def _padded(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """(B, longest) token ids, filled up with 0."""
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=self.model.device)

    def _read(self, x: torch.Tensor, sequences: Sequence[Scored], first: Sequence[int]) -> list[Score]:
        """Scores from hidden states (B, T, C); those of a row begin at position first[row]."""
        places = [(row, t) for row, s in enumerate(sequences) for t in range(s.start, s.end)]
        row, t = torch.tensor(places, device=x.device).T
        at = t - 1 - torch.tensor(first, device=x.device)[row]
        logits = head_logits(x[row, at], self.model.head_weight, self.model.config.softcap)  # (scored tokens, V)
        targets = torch.tensor([sequences[r].ids[p] for r, p in places], device=x.device)
        return scores_of(logits, targets, [s.end - s.start for s in sequences])


def scores_of(logits: torch.Tensor, targets: torch.Tensor, lengths: Sequence[int]) -> list[Score]:
    """Scores of sequences from the logits (N, V) of all their scored tokens (N,), one after the other."""
    losses = torch.logsumexp(logits, dim=-1) - logits.gather(1, targets[:, None]).squeeze(1)
    hits = logits.argmax(-1) == targets
    parts = zip(losses.cpu().split(list(lengths)), hits.cpu().split(list(lengths)))
    return [Score(float(loss.double().mean()), bool(hit.all())) for loss, hit in parts]


def shared_tokens(example: Example) -> int:
    """Tokens at the beginning of all sequences of which none is scored, or can be: what comes after must not be
    empty."""
    if len(example.sequences) < 2:
        return 0
    common = common_prefix([s.ids for s in example.sequences])
    return min(common, *(s.start for s in example.sequences), *(len(s.ids) - 1 for s in example.sequences))


def is_right(example: Example, scores: Sequence[Score]) -> bool:
    """Whether the model got the item. Of equal losses the first counts, as torch.argmin has it."""
    if example.kind == "language_modeling":
        return scores[0].greedy
    return min(range(len(scores)), key=lambda i: scores[i].mean_loss) == example.gold


# ---------------------------------------------------------------------------------------------------
# Tasks and the metric


@dataclass
class TaskResult:
    """A task's outcome."""

    label: str
    right: list[bool]
    baseline: float
    cropped: int = 0  # items whose prompt was longer than the context
    examples: list[dict[str, Any]] = field(default_factory=list)  # a few, to be read

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)

    @property
    def centered(self) -> float:
        return centered(self.accuracy, self.baseline)


@dataclass
class CoreResult:
    """All tasks' outcomes. `core` is the mean of those that were there; `missing` says which were not."""

    tasks: list[TaskResult]
    missing: list[str]
    mode: str
    baselines: str
    core: float
    low: float  # a 95% interval, over the items drawn
    high: float
    seconds: float

    @property
    def partial(self) -> bool:
        return bool(self.missing)

    def to_dict(self) -> dict[str, Any]:
        """For a report: all but the single items."""
        return {
            "core_metric": self.core,
            "core_interval": [self.low, self.high],
            "partial": self.partial,
            "missing": self.missing,
            "mode": self.mode,
            "baselines": self.baselines,
            "tasks": {
                t.label: {
                    "accuracy": t.accuracy,
                    "centered": t.centered,
                    "items": len(t.right),
                    "standard_error": bootstrap_error(t.right),
                    "chance": t.baseline,
                    "cropped": t.cropped,
                }
                for t in self.tasks
            },
        }


def centered(accuracy: Any, baseline: float) -> Any:
    """0 for guessing, 1 for all right; below 0 for worse than guessing."""
    return (accuracy - baseline) / (1 - baseline)


def published_gpt2() -> dict[str, Any]:
    """The published table: {"accuracy": {model: {task: share}}, "baseline_percent": {task: v1 chance}}."""
    return json.loads(resources.files("nanochat.evals").joinpath("core_gpt2.json").read_text(encoding="utf-8"))


def bootstrap_means(right: Sequence[bool], rng: np.random.Generator) -> np.ndarray:
    """(BOOTSTRAP,) accuracies of as many items drawn again, with replacement."""
    # Of items that are right or wrong, drawing them is drawing the number of right ones.
    return rng.binomial(len(right), sum(right) / len(right), BOOTSTRAP) / len(right)


def bootstrap_error(right: Sequence[bool], seed: int = 0) -> float:
    """Standard error of the accuracy."""
    return float(bootstrap_means(right, np.random.default_rng(seed)).std())


def evaluate_task(
    scorer: Scorer,
    task: CoreTask,
    tokenizer: TextEncoder,
    *,
    most: int = -1,
    mode: str = "reference",
    rank: int = 0,
    world_size: int = 1,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    keep: int = 2,
) -> TaskResult:
    """Ask a task's items, shared out over the ranks, and count; `keep` of them are kept to be read."""
    everything = list(enumerate(make_examples(task, tokenizer, scorer.max_tokens, most=most, mode=mode)))
    own = everything[rank::world_size]
    outcome = torch.zeros(2, len(everything), dtype=torch.float32)  # right, cropped
    kept: dict[int, dict[str, Any]] = {}
    for start in range(0, len(own), WINDOW_EXAMPLES):
        part = own[start : start + WINDOW_EXAMPLES]
        for (number, example), scores in zip(part, scorer.score([example for _, example in part]), strict=True):
            outcome[0, number], outcome[1, number] = is_right(example, scores), example.cropped
            if number < keep:
                kept[number] = {
                    "prompt": example.texts[0],
                    "gold": example.gold,
                    "right": is_right(example, scores),
                    "losses": [score.mean_loss for score in scores],
                }
    outcome = sum_over_ranks(outcome)
    right = [bool(x) for x in outcome[0].tolist()]
    return TaskResult(task.label, right, task.baseline, int(outcome[1].sum()), [kept[n] for n in sorted(kept)])


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
    """CORE of a model. `progress` is called after each task with its result and how long it took."""
    started, results = time.perf_counter(), []

    def over_ranks(values: torch.Tensor) -> torch.Tensor:
        return (
            runtime.all_reduce_sum(values.to(runtime.device), "summing CORE results").cpu()
            if runtime.world_size > 1
            else values
        )

    for task in bundle.tasks:
        began = time.perf_counter()
        result = evaluate_task(
            scorer,
            task,
            tokenizer,
            most=max_per_task,
            mode=mode,
            rank=runtime.rank,
            world_size=runtime.world_size,
            sum_over_ranks=over_ranks,
        )
        results.append(result)
        progress(result, time.perf_counter() - began)
    return summarise(results, bundle.missing + bundle.left_out, mode, baselines, time.perf_counter() - started)


def summarise(results: list[TaskResult], missing: list[str], mode: str, baselines: str, seconds: float) -> CoreResult:
    """The metric and its interval, each task's items drawn again for itself."""
    rng = np.random.default_rng(0)
    draws = np.stack([centered(bootstrap_means(r.right, rng), r.baseline) for r in results])  # (tasks, BOOTSTRAP)
    low, high = np.quantile(draws.mean(0), (0.025, 0.975))
    core = sum(r.centered for r in results) / len(results)
    return CoreResult(results, missing, mode, baselines, core, float(low), float(high), seconds)
