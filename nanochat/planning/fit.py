"""Fits the scaling law to finished runs: Huber loss on log losses, many starts, errors by bootstrap."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from nanochat.common import UserError
from nanochat.planning.law import Law, Point

HUBER = 0.005  # residuals of the log loss count squared up to here, linearly beyond: one bad run is outvoted


def fit_law(points: Sequence[Point], corpus: str = "", num_resamples: int = 100, seed: int = 0) -> Law:
    """The law with the least Huber loss on the log losses of the points, from many starts; errors by bootstrap.

    Raises UserError if the points cannot determine five parameters.
    """
    check_points(points)
    n, d, loss = np.log(np.array(points, dtype=np.float64)).T
    # Centred logarithms: A and B become the terms' values in the middle of the points, hardly correlated with the
    # exponents.
    middle_n, middle_d = n.mean(), d.mean()
    n, d = n - middle_n, d - middle_d
    shares, exponents = (0.2, 0.5, 0.8), np.log((0.15, 0.4, 0.9))
    starts = [
        # E is the share e of the lowest loss; the terms of N and D divide the rest in the ratio a : 1 - a.
        [loss.min() + math.log(e), loss.mean() + math.log((1 - e) * a), u, loss.mean() + math.log((1 - e) * (1 - a)), v]
        for e, a, u, v in itertools.product(shares, shares, exponents, exponents)
    ]
    minima, costs = _descend(np.array(starts), n, d, loss)
    best = minima[costs.argmin()]
    # Bootstrap of residuals: the fitted losses plus residuals drawn with replacement. Resampling the runs would too
    # often leave too few distinct ones. Scaled up, as fitting five parameters has shrunk the residuals.
    fitted = loss + _residuals(best[None], n, d, loss)[0][0]
    residuals = (loss - fitted) * math.sqrt(len(points) / max(1, len(points) - 5))
    drawn = np.random.default_rng(seed).choice(residuals, size=(num_resamples, len(points)))
    refits, _ = _descend(np.tile(best, (num_resamples, 1)), n, d, fitted + drawn)

    def uncentred(theta: np.ndarray) -> list[float]:
        e, a, log_alpha, b, log_beta = map(float, theta)
        alpha, beta = math.exp(log_alpha), math.exp(log_beta)
        return [math.exp(e), math.exp(a + alpha * middle_n), alpha, math.exp(b + beta * middle_d), beta]

    kept = [(float(n), float(d), float(bpb)) for n, d, bpb in points]
    E, A, alpha, B, beta = uncentred(best)
    return Law(E, A, alpha, B, beta, kept, [uncentred(theta) for theta in refits], corpus)


def check_points(points: Sequence[Point]) -> None:
    """Raise UserError if the points cannot determine five parameters."""
    if not all(math.isfinite(value) and value > 0 for point in points for value in point):
        raise UserError("a scaling law needs finite sizes, tokens and losses above 0: leave out the other runs")
    sizes, lengths = ({round(math.log(p[i]), 2) for p in points} for i in (0, 1))
    if len(points) < 6 or len(sizes) < 3 or len(lengths) < 3:
        raise UserError(
            f"a scaling law needs at least 6 runs with 3 model sizes and 3 token counts, got {len(points)} runs "
            f"with {len(sizes)} sizes and {len(lengths)} token counts"
        )


def _residuals(theta: np.ndarray, n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log residuals (S, P) and their slopes (S, P, 5) of theta (S, 5) = (log E, log A, log alpha, log B, log beta)."""
    e, a, log_alpha, b, log_beta = (column[:, None] for column in theta.T)
    size, length = -np.exp(log_alpha) * n, -np.exp(log_beta) * d  # log N^-alpha, log D^-beta
    terms = np.stack(np.broadcast_arrays(e, a + size, b + length), axis=-1)
    total = np.logaddexp.reduce(terms, axis=-1)
    of_e, of_a, of_b = np.moveaxis(np.exp(terms - total[..., None]), -1, 0)  # each term's share of the loss
    return total - loss, np.stack([of_e, of_a, of_a * size, of_b, of_b * length], axis=-1)


def _descend(
    theta: np.ndarray, n: np.ndarray, d: np.ndarray, loss: np.ndarray, steps: int = 50
) -> tuple[np.ndarray, np.ndarray]:
    """Levenberg-Marquardt on the Huber loss, S starts in one batch; loss (P,) or (S, P), in logs.

    Returns parameters (S, 5) and their costs (S,).
    """

    def cost(residuals: np.ndarray) -> np.ndarray:
        size = np.abs(residuals)
        return np.where(size < HUBER, size**2 / 2, HUBER * (size - HUBER / 2)).sum(-1)

    # Bounds for flat directions: exponents in 0.02 .. 3, E at least a hundredth of the lowest loss.
    low = np.array([loss.min() - math.log(100), -20, math.log(0.02), -20, math.log(0.02)])
    high = np.array([loss.min(), 20, math.log(3), 20, math.log(3)])
    damping = np.full(len(theta), 1e-2)
    residuals, slopes = _residuals(theta, n, d, loss)
    now = cost(residuals)
    for _ in range(steps):
        # Beyond the bend of the Huber loss the gradient is constant: the same as a smaller weight.
        weight = HUBER / np.maximum(np.abs(residuals), HUBER)
        gradient = np.einsum("spi,sp->si", slopes, weight * residuals)
        curvature = np.einsum("spi,sp,spj->sij", slopes, weight, slopes)
        scale = np.einsum("sii->si", curvature) * damping[:, None] + 1e-10
        move = np.linalg.solve(curvature + scale[:, :, None] * np.eye(5), -gradient[..., None])[..., 0]
        tried = np.clip(theta + np.clip(move, -0.5, 0.5), low, high)
        new_residuals, new_slopes = _residuals(tried, n, d, loss)
        new = cost(new_residuals)
        better = new < now
        theta, now = np.where(better[:, None], tried, theta), np.where(better, new, now)
        residuals = np.where(better[:, None], new_residuals, residuals)
        slopes = np.where(better[:, None, None], new_slopes, slopes)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-9, 1e9)
    return theta, now
