"""The fitted scaling law: the loss to expect from a model's size and its number of tokens.

N is scaling parameters (scaling.scaling_params) and D training tokens, as in the papers; losses are bits per byte.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanochat.common import UserError, read_json, write_json
from nanochat.gpt_config import GPTConfig
from nanochat.scaling import estimate, scaling_params

SOME_WAY_BEYOND = 10.0  # times the FLOPs of the largest run fitted, from where a forecast carries a warning
LAW_FILE = Path(__file__).parent / "law.json"
HUBER = 0.005  # residuals of the log loss count squared up to here and linearly beyond: one bad run is outvoted
Point = tuple[float, float, float]  # (N scaling parameters, D tokens, loss in bits per byte)


class Candidate(NamedTuple):
    """A model one could train."""

    params: int  # scaling parameters
    flops_per_token: float


class Choice(NamedTuple):
    """The model to train: its key among the candidates, the tokens it would see, and the loss to expect."""

    key: int
    tokens: float
    loss: float


class Forecast(NamedTuple):
    """A loss to expect, with its standard error."""

    bpb: float
    error: float | None
    basis: str
    beyond: float = 0.0  # times the largest run that was fitted

    def __str__(self) -> str:
        return f"{self.bpb:.4f}" + ("" if self.error is None else f" ± {self.error:.4f}")


@dataclass
class Law:
    """loss(N, D) = E + A / N^alpha + B / D^beta (Chinchilla, arXiv 2203.15556), in bits per byte.

    `resamples` are refits to other draws of the noise: (E, A, alpha, B, beta) each. The five numbers are strongly
    correlated, so errors of anything computed from them come from the resamples, not from the numbers' own errors.
    """

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    points: list[Point] = field(default_factory=list)
    resamples: list[list[float]] = field(default_factory=list)
    corpus: str = ""  # what the runs were trained and measured on

    @classmethod
    def fit(cls, points: Sequence[Point], corpus: str = "", num_resamples: int = 100, seed: int = 0) -> "Law":
        """The law of finished runs; see fit_law."""
        return fit_law(points, corpus, num_resamples, seed)

    @property
    def parameters(self) -> list[float]:
        return [self.E, self.A, self.alpha, self.B, self.beta]

    @property
    def errors(self) -> dict[str, float]:
        """Standard error of each parameter."""
        columns = zip(("E", "A", "alpha", "B", "beta"), zip(*self.resamples))
        return {name: float(np.std(values)) for name, values in columns}

    def loss(self, n: float, d: float) -> float:
        """Bits per byte of a model with n scaling parameters after d tokens."""
        return float(_law_loss(np.array(self.parameters), n, d))

    def loss_error(self, n: float, d: float) -> float | None:
        """Standard error of `loss`, from the resamples; None without any."""
        return float(np.std(_law_loss(np.array(self.resamples), n, d))) if self.resamples else None

    def forecast(self, n: float, d: float) -> Forecast:
        """The loss of a run to come, and what the figure rests on."""
        beyond = n * d / max((params * tokens for params, tokens, _ in self.points), default=math.inf)
        basis = f"a law fitted to {len(self.points)} runs" + (f" on {self.corpus}" if self.corpus else "")
        if beyond > SOME_WAY_BEYOND:
            basis += f"; this run is {beyond:.3g} times the largest of them, so trust it accordingly"
        return Forecast(self.loss(n, d), self.loss_error(n, d), basis, beyond)

    def best(self, budget_flops: float | Callable[[int], float], candidates: Mapping[int, Candidate]) -> Choice:
        """The candidate with the lowest loss when each trains for the whole budget, in FLOPs.

        A budget in seconds is a function of the candidate's key: `lambda depth: seconds * flops_per_second(depth)`.
        """
        assert candidates, "nothing to choose from"
        budget = budget_flops if callable(budget_flops) else lambda key: budget_flops
        tokens = {key: budget(key) / model.flops_per_token for key, model in candidates.items()}
        losses = {key: self.loss(model.params, tokens[key]) for key, model in candidates.items()}
        best = min(losses, key=lambda key: losses[key])
        return Choice(best, tokens[best], losses[best])

    def save(self, path: Path = LAW_FILE) -> None:
        write_json(path, {**vars(self), "errors": self.errors})

    @classmethod
    def load(cls, path: Path = LAW_FILE) -> "Law | None":
        """The law in that file; None where there is no such file yet."""
        if not path.exists():
            return None
        values = read_json(path)
        try:
            points = [(float(n), float(d), float(loss)) for n, d, loss in values.get("points", [])]
            E, A, alpha, B, beta = (float(values[name]) for name in ("E", "A", "alpha", "B", "beta"))
            return cls(E, A, alpha, B, beta, points, values.get("resamples", []), values.get("corpus", ""))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a scaling law: {error}") from error


def candidates_by_depth(form: Callable[[int], GPTConfig], depths: Iterable[int]) -> dict[int, Candidate]:
    """Candidates for Law.best: the models that `form` makes of depths."""
    found = {}
    for depth in depths:
        flops_per_token, counts = estimate(form(depth))
        found[depth] = Candidate(scaling_params(counts), flops_per_token)
    return found


def _law_loss(parameters: np.ndarray, n: float, d: float) -> np.ndarray:
    """parameters (..., 5) -> (...,)"""
    E, A, alpha, B, beta = np.moveaxis(parameters, -1, 0)
    return E + A * n**-alpha + B * d**-beta


def fit_law(points: Sequence[Point], corpus: str = "", num_resamples: int = 100, seed: int = 0) -> Law:
    """The law that fits the points' log losses best under a Huber loss, from many starts; errors by bootstrap.

    Raises UserError where the points cannot determine five numbers.
    """
    if not all(math.isfinite(value) and value > 0 for point in points for value in point):
        raise UserError("a scaling law needs sizes, lengths and losses above 0: leave runs without them out")
    sizes, lengths = ({round(math.log(p[i]), 2) for p in points} for i in (0, 1))
    if len(points) < 6 or len(sizes) < 3 or len(lengths) < 3:
        raise UserError(
            f"a scaling law needs at least six runs of three sizes and three lengths, got {len(points)} "
            f"runs of {len(sizes)} sizes and {len(lengths)} lengths"
        )
    n, d, loss = np.log(np.array(points, dtype=np.float64)).T
    # Centred logarithms: A and B become the terms' values in the middle of the points, hardly tied to the exponents.
    middle_n, middle_d = n.mean(), d.mean()
    n, d = n - middle_n, d - middle_d
    starts = np.array(
        [
            [
                loss.min() + math.log(e),
                loss.mean() + math.log((1 - e) * a),
                math.log(alpha),
                loss.mean() + math.log((1 - e) * (1 - a)),
                math.log(beta),
            ]
            for e in (0.2, 0.5, 0.8)
            for a in (0.2, 0.5, 0.8)
            for alpha in (0.15, 0.4, 0.9)
            for beta in (0.15, 0.4, 0.9)
        ]
    )
    found, costs = _descend(starts, n, d, loss)
    best = found[costs.argmin()]
    # The runs as they might have turned out: what the law says, and a residual drawn from those there are. Drawing
    # runs instead would too often leave too few different ones. Five fitted numbers have shrunk the residuals.
    fitted = loss + _residuals(best[None], n, d, loss)[0][0]
    residuals = (loss - fitted) * math.sqrt(len(points) / max(1, len(points) - 5))
    drawn = np.random.default_rng(seed).choice(residuals, size=(num_resamples, len(points)))
    again, _ = _descend(np.tile(best, (num_resamples, 1)), n, d, fitted + drawn)

    def plain(theta: np.ndarray) -> list[float]:
        e, a, log_alpha, b, log_beta = map(float, theta)
        alpha, beta = math.exp(log_alpha), math.exp(log_beta)
        return [math.exp(e), math.exp(a + alpha * middle_n), alpha, math.exp(b + beta * middle_d), beta]

    E, A, alpha, B, beta = plain(best)
    kept = [(float(n), float(d), float(bpb)) for n, d, bpb in points]
    return Law(E, A, alpha, B, beta, kept, [plain(theta) for theta in again], corpus)


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
    """Levenberg-Marquardt on the Huber loss, all S starts side by side. loss (P,) or (S, P), in logs."""

    def cost(residuals: np.ndarray) -> np.ndarray:
        size = np.abs(residuals)
        return np.where(size < HUBER, size**2 / 2, HUBER * (size - HUBER / 2)).sum(-1)

    # Exponents between 0.02 and 3, an E of at least a hundredth of the lowest loss: flat directions end somewhere.
    low = np.array([loss.min() - math.log(100), -20, math.log(0.02), -20, math.log(0.02)])
    high = np.array([loss.min(), 20, math.log(3), 20, math.log(3)])
    damping = np.full(len(theta), 1e-2)
    residuals, slopes = _residuals(theta, n, d, loss)
    now = cost(residuals)
    for _ in range(steps):
        # A point beyond the bend of the Huber loss pulls with constant force: the same as a smaller weight.
        pull = HUBER / np.maximum(np.abs(residuals), HUBER)
        gradient = np.einsum("spi,sp->si", slopes, pull * residuals)
        curvature = np.einsum("spi,sp,spj->sij", slopes, pull, slopes)
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
