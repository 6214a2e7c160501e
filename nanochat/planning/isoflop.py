"""The best model size for each compute budget, from a grid of runs: isoFLOP curves (Chinchilla, arXiv 2203.15556).

N is scaling parameters, D training tokens, C training FLOPs; losses are bits per byte.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nanochat.planning.law import Law, law_loss

GRID_SIZES = 400  # sizes from half the smallest to twice the largest model, among which the law's best is found


@dataclass
class Run:
    """A finished run of a study."""

    tag: str
    depth: int
    params: int  # N
    tokens: int  # D
    flops: float  # C
    budget: float  # requested C (--target-flops); 0 if the horizon was set otherwise
    bpb: float
    seconds: float


@dataclass
class Optimum:
    """The best model size for a budget, by a parabola through its runs and by the fitted law."""

    flops: float
    parabola: tuple[float, float] | None  # (N, bpb) at its minimum; None if the runs do not enclose one
    curve: tuple[float, float, float] | None  # (c0, c1, c2) of c0 + c1 x + c2 x^2, x = log N
    params: float  # N by the law, as are the following
    params_error: float  # relative
    ratio: float  # tokens per parameter
    ratio_error: float  # relative
    bpb: float


class Study(NamedTuple):
    """Results of a grid of runs: an optimum per budget, and how N and D grow with C: (exponent, standard error)."""

    optima: list[Optimum]
    params_exponent: tuple[float, float]
    tokens_exponent: tuple[float, float]


def best_sizes(runs: Sequence[Run], law: Law) -> Study:
    """Find the best size for each budget; the runs must have at least two budgets."""
    budgets = sorted({run.budget for run in runs if run.budget > 0})
    sizes = np.geomspace(min(r.params for r in runs) / 2, max(r.params for r in runs) * 2, GRID_SIZES)
    # FLOPs per token and parameter fall with size, as attention's share does: a power law through the runs.
    x = np.log([r.params for r in runs])
    slope, offset = np.polyfit(x, np.log([r.flops / r.tokens / r.params for r in runs]), 1)
    flops_per_token = sizes * np.exp(offset) * sizes**slope
    parameters = np.array([law.parameters, *law.resamples])[:, None]  # (1 + S, 1, 4)
    optima, log_n, log_d = [], [], []
    for budget in budgets:
        tokens = budget / flops_per_token
        losses = law_loss(parameters, sizes, tokens)  # (1 + S, GRID_SIZES)
        lowest = losses.argmin(1)
        n, d = sizes[lowest], tokens[lowest]  # the first by the law, the others by its resamples
        log_n.append(np.log(n))
        log_d.append(np.log(d))
        of_budget = [run for run in runs if run.budget == budget]
        curve = parabola(of_budget)
        optima.append(
            Optimum(
                flops=budget,
                parabola=lowest_point(curve, of_budget),
                curve=curve,
                params=float(n[0]),
                params_error=float(np.log(n).std()),
                ratio=float(d[0] / n[0]),
                ratio_error=float(np.log(d / n).std()),
                bpb=float(losses[0, lowest[0]]),
            )
        )
    return Study(optima, exponent(budgets, log_n), exponent(budgets, log_d))


def exponent(budgets: Sequence[float], logs: Sequence[np.ndarray]) -> tuple[float, float]:
    """(slope of the logs over log C by the law, its standard deviation over the resamples); logs are (1 + S,) each."""
    slopes = np.polyfit(np.log(budgets), np.stack(logs), 1)[0]
    return float(slopes[0]), float(slopes[1:].std())


def parabola(runs: Sequence[Run]) -> tuple[float, float, float] | None:
    """Least-squares (c0, c1, c2) of bpb = c0 + c1 x + c2 x^2 with x = log N; None with fewer than three sizes."""
    if len({run.params for run in runs}) < 3:
        return None
    c2, c1, c0 = np.polyfit(np.log([r.params for r in runs]), [r.bpb for r in runs], 2)
    return float(c0), float(c1), float(c2)


def lowest_point(curve: tuple[float, float, float] | None, runs: Sequence[Run]) -> tuple[float, float] | None:
    """(N, bpb) at the minimum; None if the curve has none between the smallest and the largest run."""
    if curve is None or curve[2] <= 0:
        return None
    x = -curve[1] / (2 * curve[2])
    sizes = [math.log(run.params) for run in runs]
    if not min(sizes) <= x <= max(sizes):
        return None
    return math.exp(x), curve[0] + curve[1] * x + curve[2] * x**2
