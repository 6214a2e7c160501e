"""The optimizer's state by name, whole or in pieces, so that any number of processes can load what another saved."""

import re
from typing import NamedTuple

import torch


class Place(NamedTuple):
    """Where numbers of a saved state tensor go: those from `start` on of the flat form of `shape`."""

    room: torch.Tensor  # flat
    shape: tuple[int, ...]
    start: int

    def take(self, tensor: torch.Tensor, first: int | None) -> int:
        """Copy what belongs here out of a whole tensor (first None) or a flat piece from number `first` on."""
        if first is None and tuple(tensor.shape) != self.shape:
            return 0
        flat, first = tensor.reshape(-1), first or 0
        begin, end = max(self.start, first), min(self.start + len(self.room), first + len(flat))
        if begin >= end:
            return 0
        self.room[begin - self.start : end - self.start].copy_(flat[begin - first : end - first])
        return end - begin


def parse_piece(piece: str) -> tuple[str, int]:
    """`exp_avg.wte.weight[10:20]` -> its tensor's name and 10; a whole tensor starts at 0."""
    match = re.fullmatch(r"(.*)\[(\d+):\d+\]", piece)
    return (match[1], int(match[2])) if match else (piece, 0)


def state_shapes(kind: str, p: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """The full-shape state of a parameter, by name."""
    if kind == "adamw":
        return {"exp_avg": tuple(p.shape), "exp_avg_sq": tuple(p.shape)}
    R, C = p.shape
    return {"momentum_buffer": (R, C), "second_moment": (R, 1) if R >= C else (1, C)}
