"""One update of all weights from random gradients: `python -m bench.optimizer`.

Muon and the other rules are timed apart, each with its own groups of parameters, and beside them the bare products of
Muon's orthogonalisation, at the same shapes and in the same dtype.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench import _run
from bench._common import Flags, model_config, time_in_turn
from bench._run import Result
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.runtime import Runtime
from nanochat.train.build import make_optimizer
from nanochat.train.config import TrainConfig
from scripts import _cli


class OrthogonalisationProducts:
    """The products of one update's orthogonalisation; calling it runs them all, into memory laid out before.

    For a stack x of K matrices with small side S and large side L, ns_steps times: the Gram matrix x x' (K, S, S), its
    square, and the polynomial of it times x.
    """

    def __init__(self, groups: list[dict[str, Any]], device: torch.device) -> None:
        self.products: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # (left, right, result)
        self.flops = 0
        for group in groups:
            K = len(group["params"])
            S, L = sorted(group["params"][0].shape)
            x, y = (torch.randn(K, S, L, device=device, dtype=group["ns_dtype"]) for _ in range(2))
            gram, square = (torch.randn(K, S, S, device=device, dtype=group["ns_dtype"]) for _ in range(2))
            self.products += [(x, x.mT, gram), (gram, gram, square), (square, x, y)] * group["ns_steps"]
            self.flops += group["ns_steps"] * K * (4 * S * S * L + 2 * S**3)

    def __call__(self) -> None:
        for left, right, result in self.products:
            torch.bmm(left, right, out=result)


def measure(flags: Flags, runtime: Runtime) -> Result:
    model = GPT.create(model_config(flags), runtime.device, runtime.dtype)
    for p in model.parameters():
        p.grad = torch.randn_like(p).mul_(1e-3)
    groups = make_optimizer(model, TrainConfig().optimizer_config(flags.recipe), runtime, 1e-3, 0.1).param_groups
    muon = [group for group in groups if group["kind"] == "muon"]
    others = [group for group in groups if group["kind"] != "muon"]
    products = OrthogonalisationProducts(muon, runtime.device)
    actions: dict[str, Callable[[], Any]] = {
        "step": MuonAdamW(groups).step,
        "muon": MuonAdamW(muon).step,
        "others": MuonAdamW(others).step,
        "products": products,
    }
    seconds = time_in_turn(actions, flags.seconds, runtime)
    counts = {"muon": count(muon), "others": count(others), "step": count(groups)}
    values: dict[str, Any] = {f"{name}_ms": 1e3 * took for name, took in seconds.items()}
    values |= {
        "muon_share": seconds["muon"] / (seconds["muon"] + seconds["others"]),
        "products_share": seconds["products"] / seconds["step"],
        "products_share_of_muon": seconds["products"] / seconds["muon"],
        "products_flops_per_second": products.flops / seconds["products"],
        "num_params": counts["step"],
        "num_muon_params": counts["muon"],
    }
    words = {"step": "whole update", "muon": "Muon alone", "others": "others alone", "products": "Muon's bare products"}
    rows = [
        (
            words[name],
            f"{counts[name]:,}" if name in counts else "",
            f"{1e3 * took:.3f}",
            f"{took / seconds['step']:.1%}",
        )
        for name, took in seconds.items()
    ]
    return Result("one update", ("what", "parameters", "ms", "share of the update"), rows, values)


def count(groups: list[dict[str, Any]]) -> int:
    """Parameters in groups."""
    return sum(p.numel() for group in groups for p in group["params"])


def main(argv: Sequence[str] | None = None) -> int:
    return _run.run("optimizer", Flags, measure, argv)


if __name__ == "__main__":
    _cli.run(main)
