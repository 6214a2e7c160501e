"""The output head with its loss, forward and backward, beside the plain form: `python -m bench.loss_head`.

The plain form makes all logits, softcaps them and hands them to cross_entropy. Both are held against the bare three
matrix products of the head, which neither can do without.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bench import _run
from bench._common import Flags, LinearProducts, model_config, peak_during, time_in_turn
from bench._run import Result
from nanochat.loss_head import head_loss
from nanochat.runtime import Runtime
from scripts import _cli

LossOf = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def measure(flags: Flags, runtime: Runtime) -> Result:
    config = model_config(flags)
    x = torch.randn(flags.tokens, config.n_embd, device=runtime.device, dtype=runtime.dtype, requires_grad=True)
    weight = torch.randn(flags.vocab_size, config.n_embd, device=runtime.device).mul_(0.01).requires_grad_()
    targets = torch.randint(flags.vocab_size, (flags.tokens,), device=runtime.device)

    def ours(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return head_loss(x, weight, targets, None, config.softcap)[0]

    def plain(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = F.linear(x, weight.to(x.dtype)).float()
        return F.cross_entropy(config.softcap * torch.tanh(logits / config.softcap), targets, reduction="sum")

    def both_ways(loss: LossOf) -> None:
        torch.autograd.grad(loss(x, weight, targets), (x, weight))

    forms: dict[str, Callable[[], Any]] = {"head": partial(both_ways, ours), "plain": partial(both_ways, plain)}
    # On their first calls, before the allocator keeps freed memory for the next ones.
    memory = {name: extra_bytes(form, runtime) for name, form in forms.items()}
    products = LinearProducts([(config.n_embd, flags.vocab_size)], flags.tokens, runtime)
    seconds = time_in_turn({**forms, "products": products}, flags.seconds, runtime)
    values: dict[str, Any] = {f"{name}_ms": 1e3 * took for name, took in seconds.items()}
    values |= {f"{name}_extra_bytes": extra for name, extra in memory.items()}
    values |= {
        "products_share": seconds["products"] / seconds["head"],
        "products_share_plain": seconds["products"] / seconds["plain"],
    }
    rows = [
        (name, f"{1e3 * took:.2f}", f"{seconds['products'] / took:.1%}", mebibytes(memory.get(name)))
        for name, took in seconds.items()
    ]
    columns = ("form", "forward and backward, ms", "share of bare products", "extra memory, MiB")
    return Result(
        f"head and loss of {flags.tokens:,} tokens, {config.n_embd} x {flags.vocab_size:,}", columns, rows, values
    )


def extra_bytes(action: Callable[[], Any], runtime: Runtime) -> int | None:
    """How far memory rises while `action` runs, roughly; None where the system cannot say."""
    around = peak_during(action, runtime)
    return around and around[1] - around[0]


def mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    return _run.run("loss_head", Flags, measure, argv)


if __name__ == "__main__":
    _cli.run(main)
