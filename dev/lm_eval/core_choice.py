"""The answer that base_eval counts, from the log likelihoods of lm-evaluation-harness; copied beside its tasks."""

from typing import Any


def chosen(doc: dict[str, Any], log_likelihoods: list[float]) -> int:
    """The choice with the largest mean over its tokens. A last, empty choice stands for the blank that the harness
    scores with each of the others."""
    blank = log_likelihoods[-1] if len(log_likelihoods) > len(doc["tokens"]) else 0.0
    means = [(value - blank) / count for value, count in zip(log_likelihoods, doc["tokens"])]
    return max(range(len(means)), key=means.__getitem__)


def process_results(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """The harness calls this with (log likelihood, whether greedy) of each choice."""
    return {"acc": float(chosen(doc, [value for value, _ in results]) == doc["gold"])}
