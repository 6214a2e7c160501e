"""Choosing the next token from logits.

Shapes: B rows, V vocabulary.

A draw takes one uniform number and walks the cumulative probabilities, so a row's random numbers depend
on its seed and on how many tokens it has drawn: not on its neighbours, nor on the size of the vocabulary.
"""

import ctypes
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nanochat.cpu import kernels

NOT_FINITE = "the model's logits are not finite: its weights are damaged or diverged"


@dataclass(frozen=True)
class SamplingParams:
    """How to choose. Applied in this order: temperature, then top_k, then top_p among what is left.

    Raises ValueError for a value outside what is allowed.
    """

    temperature: float = 1.0  # 0 takes the most likely token; at most a million, where all tokens are as likely
    top_k: int | None = None  # only the k most likely tokens; None or 0 is off
    top_p: float | None = None  # only the fewest tokens that together have this probability; None or 1 is off

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 1e6:
            raise ValueError(f"temperature must be a number from 0 to 1,000,000, got {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1 (off), got {self.top_p}")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn: float32 knows no smaller temperature."""
        return self.temperature < 1e-37 or self.top_k == 1


def make_rng(seed: int, index: int) -> random.Random:
    """The random numbers of sample `index` of a request: unrelated for any two (seed, index), negative too."""
    return random.Random(f"{seed}/{index}")  # a string is hashed with SHA-512, on every platform alike


def choose(logits: torch.Tensor, samplings: Sequence[SamplingParams], rngs: Sequence[random.Random]) -> list[int]:
    """The next token of each row. logits (B, V) fp32; draws one number from the generator of each row that samples.

    Raises FloatingPointError if the logits are not finite.
    """
    groups: dict[SamplingParams | None, list[int]] = {}  # None: any settings that C can draw with
    quick = kernels.in_use(logits.device)
    for row, sampling in enumerate(samplings):
        groups.setdefault(None if quick and sampling.top_p in (None, 1) else sampling, []).append(row)
    tokens = [0] * len(samplings)
    for alike, rows in groups.items():
        part = logits if len(groups) == 1 else logits[torch.tensor(rows, device=logits.device)]
        some = [rngs[row] for row in rows]
        drawn = _choose_alike(part, alike, some) if alike else _draw(part, [samplings[row] for row in rows], some)
        for row, token in zip(rows, drawn):
            tokens[row] = token
    return tokens


def _draw(logits: torch.Tensor, samplings: Sequence[SamplingParams], rngs: Sequence[random.Random]) -> list[int]:
    """choose() in C (sampling.c), for rows without top_p: one call for all, as a step takes little longer than this."""
    B, V = logits.shape
    logits = logits.contiguous()
    uniform = [0.0 if s.greedy else rng.random() for s, rng in zip(samplings, rngs)]
    tokens = (ctypes.c_long * B)()
    library = kernels.library()
    assert library is not None and logits.dtype == torch.float32
    library.draw_rows(
        ctypes.c_void_p(logits.data_ptr()),
        (ctypes.c_float * B)(*(s.temperature for s in samplings)),
        (ctypes.c_long * B)(*(1 if s.greedy else min(s.top_k or V, V) for s in samplings)),
        (ctypes.c_double * B)(*uniform),
        tokens,
        ctypes.c_long(B),
        ctypes.c_long(V),
    )
    if min(tokens) < 0:
        raise FloatingPointError(NOT_FINITE)
    return list(tokens)


def _choose_alike(logits: torch.Tensor, sampling: SamplingParams, rngs: list[random.Random]) -> list[int]:
    """choose() for rows with the same settings."""
    if sampling.greedy:
        best = logits.max(dim=-1)
        _check(best.values)
        return best.indices.tolist()
    if logits.device.type == "mps":
        logits = logits.cpu()  # an Apple GPU has no float64
    probs, ids = distribution(logits, sampling)
    cumulative = probs.double().cumsum(dim=-1)
    _check(cumulative[:, -1])
    draws = torch.tensor([[rng.random()] for rng in rngs], dtype=torch.float64).to(logits.device)
    # right=True steps over tokens of probability zero, and a target below the total never runs past the last.
    target = draws * (cumulative[:, -1:] * (1 - 1e-12))
    picked = torch.searchsorted(cumulative, target, right=True)  # (B, 1)
    return (picked if ids is None else ids.gather(-1, picked)).squeeze(-1).tolist()


def distribution(logits: torch.Tensor, sampling: SamplingParams) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What is drawn from, temperature above 0: (probabilities (B, K) that need not sum to 1, token ids (B, K)).

    Ids ascend, so that the order of two almost equal tokens never decides a draw; None stands for 0 .. V-1.
    """
    logits = logits - logits.amax(dim=-1, keepdim=True)  # a tiny temperature must not overflow
    ids = None
    if sampling.top_k and sampling.top_k < logits.size(-1):
        ids = logits.topk(sampling.top_k, dim=-1, sorted=False).indices.sort(dim=-1).values  # (B, K)
        logits = logits.gather(-1, ids)
    probs = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        probs = keep_nucleus(probs, sampling.top_p)
    return probs, ids


def keep_nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero all but the fewest most likely tokens that together reach top_p (arXiv 1904.09751); at least one stays."""
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ranked.double().cumsum(dim=-1) - ranked  # what the more likely ones have together
    ranked = ranked.masked_fill(before >= top_p, 0)
    return torch.zeros_like(probs).scatter_(-1, order, ranked)


def _check(values: torch.Tensor) -> None:
    if not torch.isfinite(values).all():
        raise FloatingPointError(NOT_FINITE)
