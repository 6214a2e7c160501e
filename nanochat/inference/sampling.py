"""Drawing the next token from logits.

SamplingParams holds the settings; a subclass or a new field changes `distribution`, the PyTorch definition. On a CPU,
sampling.c draws for the settings it implements (C_FIELDS); all others take the PyTorch path. The settings that need the
sequence and not only its logits, LOGIT_FIELDS, change the logits before the draw (logit_rules.py).

A draw takes one uniform number and walks the cumulative probabilities, so a row's random numbers depend on its seed
and on how many tokens it has drawn: not on its neighbours, nor on the size of the vocabulary.

Shapes: B rows, V vocabulary, K candidate tokens.
"""

import ctypes
import functools
import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch

from nanochat.common import UserError, warn
from nanochat.common.fast_path import changed, warn_once
from nanochat.cpu import kernels
from nanochat.runtime import to_device

NOT_FINITE = "the model's logits are not finite: its weights are damaged or diverged"


@dataclass(frozen=True)
class SamplingParams:
    """How to draw. Applied in this order: the changes to the logits, temperature, top_k, min_p, then top_p among what
    is left.

    Raises UserError, a ValueError, for a value out of range.
    """

    temperature: float = 1.0  # 0 takes the most likely token; at most a million, where all tokens are equally likely
    top_k: int | None = None  # only the k most likely tokens; None, 0 or -1 is off
    top_p: float | None = None  # only the fewest tokens whose probabilities sum to this, at least one; None or 1 is off
    seed: int = 42
    min_p: float = 0.0  # only tokens at least this likely compared with the likeliest (arXiv 2407.01082); 0 is off
    repetition_penalty: float = 1.0  # divides the positive logits of tokens in prompt and answer, multiplies negative
    presence_penalty: float = 0.0  # subtracted from the logits of tokens in the answer
    frequency_penalty: float = 0.0  # the same, for each time that the token is there
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit); also from a mapping

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 1e6:
            raise UserError(f"temperature must be a number from 0 to 1,000,000, got {self.temperature}")
        if self.top_k is not None and self.top_k < -1:
            raise UserError(f"top_k must be -1 or 0 (off) or more, got {self.top_k}")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise UserError(f"top_p must be from 0 to 1 (off), got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be from 0 (off) to 1, got {self.min_p}")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UserError(f"repetition_penalty must be from 0.01 to 100, got {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise UserError(f"{name} must be from -2 to 2, got {getattr(self, name)}")
        if self.logit_bias != ():
            pairs = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias
            object.__setattr__(self, "logit_bias", tuple(sorted((int(token), float(bias)) for token, bias in pairs)))
        if not all(-100 <= bias <= 100 for _, bias in self.logit_bias):
            raise UserError("the values of logit_bias must be from -100 to 100")
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)

    def override(self, values: object) -> "SamplingParams":
        """These settings, replaced by the attributes of `values` that have a field's name and are not None."""
        given = {f.name: getattr(values, f.name, None) for f in fields(self)}
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    # Cached, as they are read for every token:

    @functools.cached_property
    def changed_fields(self) -> frozenset[str]:
        """Names of the fields that do not have their default."""
        return frozenset(f.name for f in fields(self) if getattr(self, f.name) != f.default)

    @functools.cached_property
    def log_min_p(self) -> float:
        return math.log(self.min_p) if self.min_p else -math.inf

    @functools.cached_property
    def greedy(self) -> bool:
        """Whether the most likely token is taken: float32 has no smaller temperature than this."""
        return self.temperature < 1e-37 or self.top_k == 1 or self.top_p == 0

    def distribution(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """logits (B, V) -> (probabilities (B, K) that need not sum to 1, token ids (B, K)), for temperature above 0.

        Ids ascend, so that the order of two almost equal tokens never decides a draw; None stands for 0 .. V-1.
        """
        logits = logits - logits.amax(dim=-1, keepdim=True)  # a tiny temperature must not overflow
        ids = None
        if self.top_k and self.top_k < logits.size(-1):
            ids = logits.topk(self.top_k, dim=-1, sorted=False).indices.sort(dim=-1).values  # (B, K)
            logits = logits.gather(-1, ids)
        logits = logits / self.temperature
        if self.min_p:
            logits = logits.masked_fill(logits < self.log_min_p, -torch.inf)  # the likeliest has the logit 0
        probs = torch.softmax(logits, dim=-1)
        if self.top_p is not None and self.top_p < 1:
            probs = keep_nucleus(probs, self.top_p)
        return probs, ids


def keep_nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero all but the fewest most likely tokens that together reach top_p (arXiv 1904.09751); at least one stays."""
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ranked.double().cumsum(dim=-1) - ranked  # sum over the more likely tokens
    ranked = ranked.masked_fill(before >= top_p, 0)
    return torch.zeros_like(probs).scatter_(-1, order, ranked)


def make_rng(seed: int, index: int) -> random.Random:
    """The random numbers of sample `index` of a seed: unrelated for any two (seed, index), negative ones included."""
    return random.Random(f"{seed}/{index}")  # a string is hashed with SHA-512, the same on every platform


def draw_tokens(logits: torch.Tensor, params: Sequence[SamplingParams], rngs: Sequence[random.Random]) -> list[int]:
    """The next token of each row. logits (B, V) fp32; takes one number from the generator of each row that samples.

    Raises FloatingPointError if the logits are not finite.
    """
    if torch.are_deterministic_algorithms_enabled():
        logits = logits.cpu()  # CUDA has no deterministic cumsum
    in_c = c_can_draw(params) if kernels.in_use(logits.device) else [False] * len(params)
    if in_c and all(in_c):
        return _draw_in_c(logits, params, rngs)
    groups: dict[SamplingParams | None, list[int]] = {}  # rows with the same settings; None: all rows drawn in C
    for row, (settings, quick) in enumerate(zip(params, in_c)):
        groups.setdefault(None if quick else replace(settings, seed=0), []).append(row)
    drawn = []
    for settings_of_group, rows in groups.items():
        part = logits if len(groups) == 1 else logits[to_device(torch.tensor(rows), logits.device)]
        part_rngs = [rngs[row] for row in rows]
        if settings_of_group is None:
            drawn.append(torch.tensor(_draw_in_c(part, [params[row] for row in rows], part_rngs)))
        else:
            drawn.append(_draw_group(part, settings_of_group, part_rngs))
    tokens = torch.cat(drawn).tolist() if drawn else []  # the one time in a step that the host waits for the device
    if any(token < 0 for token in tokens):
        raise FloatingPointError(NOT_FINITE)
    return [token for _, token in sorted(zip([row for rows in groups.values() for row in rows], tokens))]


def _draw_group(logits: torch.Tensor, params: SamplingParams, rngs: list[random.Random]) -> torch.Tensor:
    """draw_tokens() in PyTorch, for rows with the same settings (B,); -1 where the logits are not finite."""
    if params.greedy:
        best = logits.max(dim=-1)
        return best.indices.where(best.values.isfinite(), -1)
    if logits.device.type == "mps":
        logits = logits.cpu()  # an Apple GPU has no float64
    probs, ids = params.distribution(logits)
    cumulative = probs.double().cumsum(dim=-1)
    finite = cumulative[:, -1:].isfinite()  # (B, 1)
    uniform = to_device(torch.tensor([[rng.random()] for rng in rngs], dtype=torch.float64), logits.device)
    # right=True steps over tokens of probability zero, and a target below the total never runs past the last.
    target = uniform * (cumulative[:, -1:] * (1 - 1e-12))
    picked = torch.searchsorted(cumulative, target, right=True).where(finite, 0)  # (B, 1)
    return (picked if ids is None else ids.gather(-1, picked)).where(finite, -1).squeeze(-1)


# ---------------------------------------------------------------------------------------------------
# The fast path on a CPU

C_FUNCTIONS = {"SamplingParams.distribution": "c17ef1fa", "_draw_group": "b47172fd"}  # see fast_path.changed
LOGIT_FIELDS = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")  # see logit_rules.py
C_FIELDS = ("temperature", "top_k", "top_p", "seed", "min_p", *LOGIT_FIELDS)  # that sampling.c implements or can ignore


def c_can_draw(params: Sequence[SamplingParams]) -> list[bool]:
    """Whether sampling.c implements each of the settings: not top_p, which needs a sort, nor any field it lacks."""
    if edited := changed(C_FUNCTIONS, sys.modules[__name__]):
        warn_once(f"drawing tokens in PyTorch, slower: sampling.c does not implement the changed {', '.join(edited)}")
    if edited or not c_agrees():
        return [False] * len(params)
    return [_in_c(p) for p in params]


def _in_c(params: SamplingParams) -> bool:
    plain = type(params) is SamplingParams and (params.top_p in (None, 1) or params.greedy)
    return plain and params.changed_fields.issubset(C_FIELDS)


@functools.cache
def c_agrees() -> bool:
    """Whether sampling.c draws the tokens that PyTorch draws for a small input; if not, warns once."""
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    for params in (SamplingParams(), SamplingParams(0.7, 20), SamplingParams(0.0), SamplingParams(min_p=0.05)):
        rngs = [make_rng(0, i) for i in range(16)], [make_rng(0, i) for i in range(16)]
        plain = _draw_group(logits.expand(16, -1), params, rngs[1]).tolist()
        if _draw_in_c(logits.expand(16, -1), [params] * 16, rngs[0]) != plain:
            warn("sampling.c disagrees with PyTorch on this machine; tokens are drawn in PyTorch, which is slower")
            return False
    return True


def _draw_in_c(logits: torch.Tensor, params: Sequence[SamplingParams], rngs: Sequence[random.Random]) -> list[int]:
    """draw_tokens() in C: one call for all rows, as PyTorch's calls would take almost as long as a decode step."""
    B, V = logits.shape
    logits = logits.contiguous()
    uniform = [0.0 if p.greedy else rng.random() for p, rng in zip(params, rngs)]
    tokens = (ctypes.c_long * B)()
    library = kernels.library()
    assert library is not None and logits.dtype == torch.float32
    library.draw_rows(
        ctypes.c_void_p(logits.data_ptr()),
        (ctypes.c_float * B)(*(p.temperature for p in params)),
        (ctypes.c_long * B)(*(1 if p.greedy else min(p.top_k or V, V) for p in params)),
        (ctypes.c_float * B)(*(p.log_min_p for p in params)),
        (ctypes.c_double * B)(*uniform),
        tokens,
        ctypes.c_long(B),
        ctypes.c_long(V),
    )
    if min(tokens) < 0:
        raise FloatingPointError(NOT_FINITE)
    return list(tokens)
