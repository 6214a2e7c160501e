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

    Raises UserError if the points cannot determine four parameters.
    """
    check_points(points)
    n, d, loss = np.log(np.array(points, dtype=np.float64)).T
    # Centred logarithms: the two limits' values in the middle of the points are hardly correlated with the exponents.
    middle_n, middle_d = n.mean(), d.mean()
    n, d = n - middle_n, d - middle_d
    gaps, exponents = (0.1, 0.3, 0.7), np.log((0.05, 0.1, 0.2, 0.4))  # of the limits below the mean log loss
    starts = [
        [loss.mean() - a, u, loss.mean() - b, v] for a, u, b, v in itertools.product(gaps, exponents, gaps, exponents)
    ]
    minima, costs = _descend(np.array(starts), n, d, loss)
    best = minima[costs.argmin()]
    # Bootstrap of residuals: the fitted losses plus residuals drawn with replacement. Resampling the runs would too
    # often leave too few distinct ones. Scaled up, as fitting four parameters has shrunk the residuals.
    fitted = loss + _residuals(best[None], n, d, loss)[0][0]
    residuals = (loss - fitted) * math.sqrt(len(points) / max(1, len(points) - 4))
    drawn = np.random.default_rng(seed).choice(residuals, size=(num_resamples, len(points)))
    refits, _ = _descend(np.tile(best, (num_resamples, 1)), n, d, fitted + drawn)

    def uncentred(theta: np.ndarray) -> list[float]:
        log_size, log_alpha, log_length, log_beta = map(float, theta)
        alpha, beta = math.exp(log_alpha), math.exp(log_beta)
        return [math.exp(log_size / alpha + middle_n), alpha, math.exp(log_length / beta + middle_d), beta]

    kept = [(float(n), float(d), float(bpb)) for n, d, bpb in points]
    N0, alpha, D0, beta = uncentred(best)
    return Law(N0, alpha, D0, beta, kept, [uncentred(theta) for theta in refits], corpus)


def check_points(points: Sequence[Point]) -> None:
    """Raise UserError if the points cannot determine four parameters."""
    if not all(math.isfinite(value) and value > 0 for point in points for value in point):
        raise UserError("a scaling law needs finite sizes, tokens and losses above 0: leave out the other runs")
    sizes, lengths = ({round(math.log(p[i]), 2) for p in points} for i in (0, 1))
    if len(points) < 6 or len(sizes) < 3 or len(lengths) < 3:
        raise UserError(
            f"a scaling law needs at least 6 runs with 3 model sizes and 3 token counts, got {len(points)} runs "
            f"with {len(sizes)} sizes and {len(lengths)} token counts"
        )


def _residuals(theta: np.ndarray, n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log residuals (S, P) and their slopes (S, P, 4) of theta (S, 4) = (a, log alpha, b, log beta).

    a and b are the logs of the two limits, (N0 / N)^alpha and (D0 / D)^beta, in the middle of the points. The law is
    their soft maximum: log loss = beta log(exp(size / beta) + exp(length / beta)).
    """
    a, log_alpha, b, log_beta = (column[:, None] for column in theta.T)
    beta, slope_n, slope_d = np.exp(log_beta), -np.exp(log_alpha) * n, -np.exp(log_beta) * d
    size, length = a + slope_n, b + slope_d  # logs of the limits
    total = np.logaddexp(size / beta, length / beta)
    of_size = np.exp(size / beta - total)  # its weight in the soft maximum
    of_length = 1 - of_size
    of_beta = beta * total - of_size * size - of_length * length + of_length * slope_d
    slopes = np.stack(np.broadcast_arrays(of_size, of_size * slope_n, of_length, of_beta), axis=-1)
    return beta * total - loss, slopes


def _descend(
    theta: np.ndarray, n: np.ndarray, d: np.ndarray, loss: np.ndarray, steps: int = 50
) -> tuple[np.ndarray, np.ndarray]:
    """Levenberg-Marquardt on the Huber loss, S starts in one batch; loss (P,) or (S, P), in logs.

    Returns parameters (S, 4) and their costs (S,).
    """

    def cost(residuals: np.ndarray) -> np.ndarray:
        size = np.abs(residuals)
        return np.where(size < HUBER, size**2 / 2, HUBER * (size - HUBER / 2)).sum(-1)

    # Bounds for flat directions: exponents in 0.01 .. 3.
    low = np.array([-20, math.log(0.01), -20, math.log(0.01)])
    high = np.array([20, math.log(3), 20, math.log(3)])
    damping = np.full(len(theta), 1e-2)
    residuals, slopes = _residuals(theta, n, d, loss)
    now = cost(residuals)
    for _ in range(steps):
        # Beyond the bend of the Huber loss the gradient is constant: the same as a smaller weight.
        weight = HUBER / np.maximum(np.abs(residuals), HUBER)
        gradient = np.einsum("spi,sp->si", slopes, weight * residuals)
        curvature = np.einsum("spi,sp,spj->sij", slopes, weight, slopes)
        scale = np.einsum("sii->si", curvature) * damping[:, None] + 1e-10
        move = np.linalg.solve(curvature + scale[:, :, None] * np.eye(4), -gradient[..., None])[..., 0]
        tried = np.clip(theta + np.clip(move, -0.5, 0.5), low, high)
        new_residuals, new_slopes = _residuals(tried, n, d, loss)
        new = cost(new_residuals)
        better = new < now
        theta, now = np.where(better[:, None], tried, theta), np.where(better, new, now)
        residuals = np.where(better[:, None], new_residuals, residuals)
        slopes = np.where(better[:, None, None], new_slopes, slopes)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-9, 1e9)
    return theta, now
