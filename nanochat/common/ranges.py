"""Allowed ranges of a config's numbers, declared beside each field and checked in one place.

    @dataclass
    class Config:
        num_epochs: Annotated[int, Range(1)] = 1
        minutes: Annotated[float, Range(above=0, unset=-1)] = -1.0

`scripts._cli.parse` checks what came from the command line; a dataclass made from elsewhere calls check_ranges itself.
"""

from dataclasses import dataclass
from typing import Any, get_type_hints

from nanochat.common import UserError


@dataclass(frozen=True)
class Range:
    """min <= value <= max and above < value < below, as far as given; `unset` is allowed too. NaN never is."""

    min: float | None = None
    max: float | None = None
    above: float | None = None
    below: float | None = None
    unset: float | None = None  # the value that stands for "derive it", "off" or "all"

    def __contains__(self, value: float) -> bool:
        return value == self.unset or (
            value == value
            and (self.min is None or value >= self.min)
            and (self.max is None or value <= self.max)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """`at least 1 (or -1)`"""
        words = {"at least": self.min, "above": self.above, "at most": self.max, "below": self.below}
        limits = " and ".join(f"{word} {limit}" for word, limit in words.items() if limit is not None)
        return limits if self.unset is None else f"{limits} (or {self.unset})"


def check_ranges(config: Any, flags: bool = True) -> None:
    """Raise UserError for the first field of a dataclass that lies outside its declared range.

    `flags`: the fields are flags of the command line, and are named as such.
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        for allowed in getattr(hint, "__metadata__", ()):
            if isinstance(allowed, Range) and value is not None and value not in allowed:
                shown = f"--{name.replace('_', '-')}" if flags else name
                raise UserError(f"{shown} must be {allowed}, got {value}")
