"""What goes wrong on some process of a run only: weights that drift, a loss that is not a number, data that fails."""

import json

import torch
from torch import nn

from nanochat.common import BadShard, UserError
from nanochat.distributed.signals import StopRequested
from nanochat.runtime import Runtime


class DataError(UserError):
    """Some process cannot read what it is to train on, or to evaluate; all of them know. A trainer saves first."""


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite. The weights are those from before the step."""


class RanksDiverged(RuntimeError):
    """Some processes' weights are not the others'. The message names their ranks."""


def find_diverged_ranks(runtime: Runtime, model: nn.Module) -> list[int]:
    """The ranks whose weights are not those of most; where no side has more, those that differ from the lowest rank's.

    Alike on all processes; costs one pass over the weights and a few bytes between processes.
    """
    if runtime.world_size == 1:
        return []
    sums = runtime.all_gather(checksum(model), "comparing the weights")
    most = max(sums, key=sums.count)
    return [rank for rank, own in enumerate(sums) if own != most]


def checksum(model: nn.Module) -> torch.Tensor:
    """A number that nearly always changes when any parameter does: of each the sum of its bits, then those by place."""
    total = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)
    for p in model.parameters():
        bits = p.detach().view(torch.int32 if p.element_size() == 4 else torch.int16)
        total = 31 * total + bits.sum(dtype=torch.int64)
    return total


def non_finite(model: nn.Module) -> list[str]:
    """The parameters that hold a NaN or an infinity. Costs one pass over the weights."""
    return [name for name, p in model.named_parameters() if not p.isfinite().all()]


def describe_non_finite_ranks(runtime: Runtime, own_loss: torch.Tensor | None, origin: str) -> str:
    """Which ranks' losses are not finite, and what data they had, alike on all; `origin` tells of this process's."""
    origins = runtime.all_gather_text(origin, "naming the data")
    if own_loss is None or runtime.world_size == 1:
        return origin
    finite = runtime.all_gather(own_loss.isfinite().float(), "naming the rank of a loss")
    bad = [rank for rank, good in enumerate(finite) if not good]
    if not bad:  # only their sum overflows
        return f"all ranks together: {origins[0]}; ..."
    named = "; ".join(f"rank {rank}: {origins[rank]}" for rank in bad[:4])
    return named + (f"; and ranks {', '.join(map(str, bad[4:]))}" if bad[4:] else "")


def raise_on_all_ranks(runtime: Runtime, failure: BaseException | None) -> None:
    """Raise on all processes what kept some from its data: StopRequested if that was it, else DataError. `failure` is
    this process's."""
    word = runtime.all_reduce_max(
        0 if failure is None else 2 if isinstance(failure, StopRequested) else 1, "telling of failures"
    )
    if word == 2:
        raise StopRequested("asked to stop") from failure
    if word == 1:
        raise DataError(gather_failures(runtime, failure, may_skip=False)[1]) from failure


def gather_failures(
    runtime: Runtime, failure: BaseException | None, may_skip: bool
) -> tuple[dict[str, str], str | None]:
    """(shards that some process could not read -> why, what else failed or None), alike on all.

    `failure` is this process's. Without `may_skip` a bad shard is like any other failure.
    """
    mine = {"error": str(failure) or type(failure).__name__} if failure else {}
    if may_skip and isinstance(failure, BadShard):
        mine["shard"] = failure.shard
    told = [json.loads(text) for text in runtime.all_gather_text(json.dumps(mine), "telling of data that failed")]
    shards = {one["shard"]: one["error"] for one in told if "shard" in one}
    return shards, next((one["error"] for one in told if "error" in one and "shard" not in one), None)
