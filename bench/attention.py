"""The attention of training, full and short window, beside PyTorch's own kernel: `python -m bench.attention`.

Measured at the context --seq-len, at twice and at four times that, with fewer rows in turn, so that the number of
tokens stays the same: a cost per token that doubles with the context is what full attention has.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bench import _run
from bench._common import Flags, model_config, time_in_turn
from bench._run import Result
from nanochat.flash_attention import flash_attn
from nanochat.runtime import Runtime
from scripts import _cli

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PyTorch's causal attention in our layout, (B, T, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)


def windows(flags: Flags, length: int) -> dict[str, Attention]:
    """What is compared at a context of `length` tokens."""
    short = model_config(replace(flags, seq_len=length)).short_window
    ours = partial(flash_attn.flash_attn_func, causal=True)
    return {
        "full": partial(ours, window_size=(length, 0)),
        "short": partial(ours, window_size=(short, 0)),
        "torch": torch_attention,
    }


def actions_at(flags: Flags, length: int, runtime: Runtime) -> tuple[int, dict[str, Callable[[], Any]]]:
    """(tokens, what to time on them) at a context of `length`."""
    config = model_config(flags)
    rows = max(1, flags.tokens // length)
    like: dict[str, Any] = {"device": runtime.device, "dtype": runtime.dtype}
    q = torch.randn(rows, length, config.n_head, config.head_dim, requires_grad=True, **like)
    k, v = (torch.randn(rows, length, config.n_kv_head, config.head_dim, requires_grad=True, **like) for _ in range(2))
    upstream = torch.randn(rows, length, config.n_head, config.head_dim, **like)

    def both(attention: Attention) -> None:
        torch.autograd.grad(attention(q, k, v), (q, k, v), upstream)

    actions: dict[str, Callable[[], Any]] = {}
    for name, attention in windows(flags, length).items():
        actions[f"{name}_forward"] = partial(attention, q, k, v)  # as in training: what backward needs is kept
        actions[f"{name}_both"] = partial(both, attention)
    return rows * length, actions


def measure(flags: Flags, runtime: Runtime) -> Result:
    values: dict[str, float] = {}
    rows = []
    for times in (1, 2, 4):
        tokens, actions = actions_at(flags, times * flags.seq_len, runtime)
        seconds = time_in_turn(actions, flags.seconds, runtime)
        for kind in ("full", "short", "torch"):
            forward, both = seconds[f"{kind}_forward"], seconds[f"{kind}_both"]
            values |= {
                f"{kind}_forward_ms_{times}x": 1e3 * forward,
                f"{kind}_forward_backward_ms_{times}x": 1e3 * both,
                f"{kind}_us_per_token_{times}x": 1e6 * both / tokens,
            }
            rows.append(
                (
                    f"{times * flags.seq_len:,}",
                    kind,
                    f"{1e3 * forward:.3f}",
                    f"{1e3 * both:.3f}",
                    f"{1e6 * both / tokens:.3f}",
                )
            )
    columns = ("context", "window", "forward, ms", "and backward, ms", "both, us per token")
    return Result(f"one layer's attention, {flags.tokens:,} tokens or one row", columns, rows, values)


def main(argv: Sequence[str] | None = None) -> int:
    return _run.run("attention", Flags, measure, argv)


if __name__ == "__main__":
    _cli.run(main)
