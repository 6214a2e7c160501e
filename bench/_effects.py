"""What pairs of runs say: an interval on the difference, a verdict, and which candidate to try next."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev

from bench._race import Side
from nanochat.common import UserError

# Two-sided 95% points of Student's t for 1, 2, … degrees of freedom; beyond the last one close to the normal's.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
NOISE = 0.01  # bits per byte: what is assumed of two pairs' spread before there are two
MAX_PAIRS = 8  # of one candidate; what is not told apart by then counts as equal


@dataclass
class Effect:
    """The differences b - a of the pairs of one comparison, in bits per byte: negative is better."""

    differences: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # of side b

    @property
    def mean(self) -> float:
        return mean(self.differences) if self.differences else math.nan

    @property
    def half_width(self) -> float:
        """Half of the 95% interval of the mean; infinite for a single pair."""
        n = len(self.differences)
        if n < 2:
            return math.inf
        return T95[min(n - 1, len(T95)) - 1] * stdev(self.differences) / math.sqrt(n)

    @property
    def verdict(self) -> str:
        """better, worse, failed, or not told apart."""
        if self.failures:
            return "failed"
        if not self.differences or abs(self.mean) <= self.half_width:
            return "not told apart"
        return "better" if self.mean < 0 else "worse"

    def __str__(self) -> str:
        if not self.differences:
            return "-"
        return f"{self.mean:+.4f}" + (f" ± {self.half_width:.4f}" if len(self.differences) > 1 else "")


@dataclass
class Search:
    """The candidates of a search, what is known about each against the present baseline, and the baseline.

    Candidates are tried by optimism: the next pair goes to the one whose mean may still be lowest. Once all are told
    apart from the baseline, or have had MAX_PAIRS, the best of the better ones joins the baseline, and the others are
    tried against that.
    """

    baseline: Side
    candidates: list[Side]
    effects: dict[tuple[str, str], Effect] = field(default_factory=dict)  # by the texts of baseline and candidate

    def effect(self, candidate: Side) -> Effect:
        return self.effects.setdefault((self.baseline.text, candidate.text), Effect())

    def record(self, baseline: str, candidate: str, a: float | str, b: float | str) -> None:
        """Add a pair's result. One whose side a failed says nothing about b."""
        effect = self.effects.setdefault((baseline, candidate), Effect())
        if isinstance(a, str):
            return
        if isinstance(b, str):
            effect.failures.append(b)
        else:
            effect.differences.append(b - a)

    def next_candidate(self) -> Side | None:
        """The candidate of the next pair, after the baseline has taken up what is better; None at the end."""
        while True:
            if open_ones := [c for c in self.candidates if self._is_open(self.effect(c))]:
                return min(open_ones, key=lambda c: self._hope(self.effect(c)))
            better = [c for c in self.candidates if self.effect(c).verdict == "better"]
            if not better:
                return None
            best = min(better, key=lambda c: self.effect(c).mean)
            self.baseline = self.baseline.plus(best)
            self.candidates.remove(best)

    def _is_open(self, effect: Effect) -> bool:
        return effect.verdict == "not told apart" and len(effect.differences) < MAX_PAIRS

    def _hope(self, effect: Effect) -> float:
        """How low the mean may still be; what was never tried comes first."""
        n = len(effect.differences)
        if not n:
            return -math.inf
        spread = stdev(effect.differences) if n > 1 else NOISE
        return effect.mean - 2 * spread / math.sqrt(n)


def read_candidates(lines: Iterable[str]) -> list[Side]:
    """One candidate a line; blank lines and what follows a # are left out. Raises UserError for a wrong one."""
    texts = (line.partition("#")[0].strip() for line in lines)
    if not (found := {text: Side.parse(text) for text in texts if text}):
        raise UserError("--candidates: the file has no side to race, one a line, such as backout=False")
    return list(found.values())


def ranking(search: Search, baseline: Side) -> list[Sequence[str]]:
    """Table rows of the candidates that were tried against `baseline`, the best first."""
    tried = [(text, effect) for (base, text), effect in search.effects.items() if base == baseline.text]
    tried = [(text, effect) for text, effect in tried if effect.differences or effect.failures]
    tried.sort(key=lambda item: item[1].mean if item[1].differences else math.inf)
    return [(text or "as it is", str(len(e.differences)), str(e), e.verdict) for text, e in tried]
