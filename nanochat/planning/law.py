"""The scaling law: forecasts a model's loss from its size and its training tokens. fit.py fits it.

N is scaling parameters (scaling.scaling_params) and D training tokens, as in the papers; losses are bits per byte.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanochat.common import write_json
from nanochat.common.files import read_json
from nanochat.gpt_config import GPTConfig
from nanochat.scaling import estimate, scaling_params

WARN_EXTRAPOLATION = 10.0  # beyond this many times the FLOPs of the largest run fitted, a forecast carries a warning
PARAMETERS = ("N0", "alpha", "D0", "beta")
LAW_FILE = Path(__file__).parent / "law.json"
Point = tuple[float, float, float]  # (N scaling parameters, D tokens, loss in bits per byte)


class Candidate(NamedTuple):
    """The costs of a model that could be trained."""

    params: int  # scaling parameters
    flops_per_token: float

    @classmethod
    def of(cls, config: GPTConfig) -> "Candidate":
        flops_per_token, counts = estimate(config)
        return cls(scaling_params(counts), flops_per_token)


class Choice(NamedTuple):
    """The best candidate: its key, its training tokens and its expected loss."""

    key: int
    tokens: float
    loss: float


class Forecast(NamedTuple):
    """An expected loss with its standard error: of the law, and of how far single runs lie from it."""

    bpb: float
    error: float
    basis: str
    extrapolation: float = 0.0  # training FLOPs relative to the largest run fitted

    def __str__(self) -> str:
        far = f", extrapolated {self.extrapolation:.2g} times" if self.extrapolation > WARN_EXTRAPOLATION else ""
        return f"{self.bpb:.4f} ± {self.error:.4f}{far}"


@dataclass
class Law:
    """loss(N, D) = ((N0 / N)^(alpha/beta) + D0 / D)^beta in bits per byte, as in Kaplan et al. (arXiv 2001.08361).

    With tokens without end a model reaches (N0 / N)^alpha, and a model of any size (D0 / D)^beta after D tokens.
    E + A / N^alpha + B / D^beta (Chinchilla, arXiv 2203.15556) has a parameter more and misses the runs of
    law.json by twice as much: there, larger models gain more from the same tokens, which no sum says (dev/LOG.md).

    `resamples` are fits to bootstrap samples: the four parameters each. They are strongly correlated, so the error of
    anything computed from them is its spread over the resamples.
    """

    N0: float
    alpha: float
    D0: float
    beta: float
    points: list[Point] = field(default_factory=list)
    resamples: list[list[float]] = field(default_factory=list)
    corpus: str = ""  # text the runs were trained and validated on

    @property
    def parameters(self) -> list[float]:
        return [getattr(self, name) for name in PARAMETERS]

    @property
    def errors(self) -> dict[str, float]:
        """Standard error of each parameter."""
        return {name: float(np.std(values)) for name, values in zip(PARAMETERS, zip(*self.resamples))}

    @property
    def scatter(self) -> float:
        """Standard deviation of the fitted runs from the law, relative to it."""
        return float(np.std([loss / self.loss(n, d) - 1 for n, d, loss in self.points])) if self.points else 0.0

    def loss(self, n: float, d: float) -> float:
        """Bits per byte of a model with n scaling parameters after d tokens."""
        return float(law_loss(np.array(self.parameters), n, d))

    def loss_error(self, n: float, d: float) -> float:
        """Standard error of `loss`, from the resamples; 0 without any."""
        return float(np.std(law_loss(np.array(self.resamples), n, d))) if self.resamples else 0.0

    def forecast(self, n: float, d: float) -> Forecast:
        """The expected loss of a run, with the basis of the figure in words."""
        extrapolation = n * d / max((params * tokens for params, tokens, _ in self.points), default=math.inf)
        basis = f"a law fitted to {len(self.points)} runs" + (f" on {self.corpus}" if self.corpus else "")
        if extrapolation > WARN_EXTRAPOLATION:
            basis += f"; this run is {extrapolation:.3g} times the largest of them, an extrapolation"
        loss = self.loss(n, d)
        return Forecast(loss, math.hypot(self.loss_error(n, d), self.scatter * loss), basis, extrapolation)

    def best(self, budget_flops: Callable[[int], float], candidates: Mapping[int, Candidate]) -> Choice:
        """The candidate with the lowest loss after `budget_flops(key)` training FLOPs each.

        A budget in seconds is `lambda depth: seconds * flops_per_second(depth)`.
        """
        tokens = {key: budget_flops(key) / model.flops_per_token for key, model in candidates.items()}
        losses = {key: self.loss(model.params, tokens[key]) for key, model in candidates.items()}
        best = min(losses, key=lambda key: losses[key])
        return Choice(best, tokens[best], losses[best])

    def save(self, path: Path = LAW_FILE) -> None:
        write_json(path, {**vars(self), "errors": self.errors})

    @classmethod
    def load(cls, path: Path = LAW_FILE) -> "Law | None":
        """Read a law; None if the file does not exist."""
        return read_json(path, cls, extra="ignore") if path.exists() else None


def law_loss(parameters: np.ndarray, n: float | np.ndarray, d: float | np.ndarray) -> np.ndarray:
    """Losses of many parameter sets: parameters (..., 4) -> (...), with n and d broadcast against (...)."""
    N0, alpha, D0, beta = np.moveaxis(parameters, -1, 0)
    return ((N0 / n) ** (alpha / beta) + D0 / d) ** beta
