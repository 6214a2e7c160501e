"""Optimizer state in a checkpoint, by name: any world size loads what another one saved.

A state tensor is saved whole as "<state>.<parameter>", or, where ranks hold ranges of its flat form, by each of them as
"<state>.<parameter>[start:stop]".
"""

import re
from typing import NamedTuple

import torch


class StateSlot(NamedTuple):
    """This rank's part of a state tensor, to be loaded: elements `start` onwards of the flat form of `shape`."""

    target: torch.Tensor  # flat
    shape: tuple[int, ...]
    start: int

    def copy_from(self, saved: torch.Tensor, first: int | None) -> int:
        """Copy the overlap with a saved tensor, whole (`first` None) or flat from element `first` on.

        Returns the number of elements copied: 0 too if a whole tensor has another shape.
        """
        if first is None and tuple(saved.shape) != self.shape:
            return 0
        flat, first = saved.reshape(-1), first or 0
        begin, end = max(self.start, first), min(self.start + len(self.target), first + len(flat))
        if begin >= end:
            return 0
        self.target[begin - self.start : end - self.start].copy_(flat[begin - first : end - first])
        return end - begin


def parse_name(saved_name: str) -> tuple[str, int | None]:
    """Split `exp_avg.wte.weight[10:20]` into the tensor's name and 10; the latter is None for a whole tensor."""
    match = re.fullmatch(r"(.*)\[(\d+):\d+\]", saved_name)
    return (match[1], int(match[2])) if match else (saved_name, None)
