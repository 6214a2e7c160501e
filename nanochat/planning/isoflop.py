"""What a grid of runs says about the best size at each compute budget: isoFLOP curves (Chinchilla, arXiv 2203.15556).

N is scaling parameters, D training tokens, C training FLOPs; losses are bits per byte.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanochat.planning.law import Law

SIZES_TRIED = 400  # between half the smallest and twice the largest model, for the law's best one


@dataclass
class Run:
    """A finished run of a study."""

    tag: str
    depth: int
    params: int  # N
    tokens: int  # D
    flops: float  # C
    budget: float  # the C asked for, or 0 where the horizon was another
    bpb: float
    seconds: float


@dataclass
class Optimum:
    """The best size for a budget, by a parabola through its runs and by the fitted law."""

    flops: float
    parabola: tuple[float, float] | None  # (N, bpb); None with too few runs, or where it has no lowest point inside
    curve: tuple[float, float, float] | None  # the parabola in log N: c0 + c1 x + c2 x^2
    params: float  # by the law, as are the following
    params_error: float  # relative
    ratio: float  # tokens per parameter
    ratio_error: float  # relative
    bpb: float


def best_sizes(runs: Sequence[Run], law: Law) -> tuple[list[Optimum], tuple[float, float], tuple[float, float]]:
    """(optima by budget, of which there must be two; exponent of N in C with its standard error; the same of D)."""
    budgets = sorted({run.budget for run in runs if run.budget > 0})
    sizes = np.geomspace(min(r.params for r in runs) / 2, max(r.params for r in runs) * 2, SIZES_TRIED)
    # FLOPs per token and parameter fall with size, as attention's share does: a power law through the runs.
    x = np.log([r.params for r in runs])
    slope, offset = np.polyfit(x, np.log([r.flops / r.tokens / r.params for r in runs]), 1)
    per_token = sizes * np.exp(offset) * sizes**slope
    parameters = np.array([law.parameters, *law.resamples])  # (1 + S, 5)
    found, best_n, best_d = [], [], []
    for budget in budgets:
        tokens = budget / per_token
        E, A, alpha, B, beta = (column[:, None] for column in parameters.T)
        losses = E + A * sizes**-alpha + B * tokens**-beta  # (1 + S, sizes)
        lowest = losses.argmin(1)
        n, d = sizes[lowest], tokens[lowest]
        best_n.append(np.log(n))
        best_d.append(np.log(d))
        of_budget = [run for run in runs if run.budget == budget]
        curve = parabola(of_budget)
        found.append(
            Optimum(
                budget,
                lowest_point(curve, of_budget),
                curve,
                float(n[0]),
                float(np.log(n).std()),
                float(d[0] / n[0]),
                float(np.log(d / n).std()),
                float(losses[0, lowest[0]]),
            )
        )
    return found, exponent(budgets, best_n), exponent(budgets, best_d)


def exponent(budgets: Sequence[float], logs: Sequence[np.ndarray]) -> tuple[float, float]:
    """(slope of the logs over log C by the law, its standard deviation over the resamples)."""
    slopes = np.polyfit(np.log(budgets), np.stack(logs), 1)[0]
    return float(slopes[0]), float(slopes[1:].std())


def parabola(runs: Sequence[Run]) -> tuple[float, float, float] | None:
    """bpb = c0 + c1 x + c2 x^2 with x = log N, by least squares; None with fewer than three sizes."""
    if len({run.params for run in runs}) < 3:
        return None
    c2, c1, c0 = np.polyfit(np.log([r.params for r in runs]), [r.bpb for r in runs], 2)
    return float(c0), float(c1), float(c2)


def lowest_point(curve: tuple[float, float, float] | None, runs: Sequence[Run]) -> tuple[float, float] | None:
    """(N, bpb) at the bottom; None where the curve has none between the smallest and the largest run."""
    if curve is None or curve[2] <= 0:
        return None
    x = -curve[1] / (2 * curve[2])
    sizes = [math.log(run.params) for run in runs]
    if not min(sizes) <= x <= max(sizes):
        return None
    return math.exp(x), curve[0] + curve[1] * x + curve[2] * x**2
