"""Checks across ranks: diverged weights, non-finite losses, unreadable data. All ranks come to the same conclusion."""

import torch
from torch import nn

from nanochat.common import BadShard, UserError
from nanochat.distributed.signals import StopRequested
from nanochat.runtime import Runtime


class DataError(UserError):
    """Some rank cannot read its training or evaluation data; raised on all ranks. A trainer saves first."""


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; raised on all ranks. The weights are those from before the step."""


class RanksDiverged(RuntimeError):
    """Some ranks' weights differ from the majority's; raised on all ranks. The message names them."""


def find_diverged_ranks(runtime: Runtime, model: nn.Module) -> list[int]:
    """The ranks whose weights differ from the majority's (from the lowest rank's where there is none).

    Collective: every rank must call it. Costs one pass over the weights and a few bytes per rank.
    """
    if runtime.world_size == 1:
        return []
    checksums = runtime.all_gather(int(checksum(model)), "comparing the weights")
    majority = max(checksums, key=checksums.count)
    return [rank for rank, value in enumerate(checksums) if value != majority]


@torch.no_grad()
def share_weights(runtime: Runtime, model: nn.Module) -> None:
    """Give all ranks the main rank's parameters, if some differ. Collective: every rank must call it.

    From one seed a GPU draws numbers that depend on how many processors it has
    (https://github.com/pytorch/pytorch/issues/196613), so unlike GPUs begin with unlike weights.
    """
    if find_diverged_ranks(runtime, model):
        for p in model.parameters():
            runtime.all_reduce_sum(p.detach().mul_(float(runtime.is_main)), "sharing the first weights")


def checksum(model: nn.Module) -> torch.Tensor:
    """A 64-bit checksum of all parameters: a polynomial (base 31) in the sums of each parameter's bits. Shape ()."""
    total = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)
    for p in model.parameters():
        bits = p.detach().view(torch.int32 if p.element_size() == 4 else torch.int16)
        total = 31 * total + bits.sum(dtype=torch.int64)
    return total


def non_finite(model: nn.Module) -> list[str]:
    """Names of this rank's parameters that hold a NaN or an infinity. Costs one pass over the weights."""
    return [name for name, p in model.named_parameters() if not p.isfinite().all()]


def describe_non_finite_ranks(runtime: Runtime, own_loss: torch.Tensor, origin: str) -> str:
    """Describe which ranks' losses are not finite, and their data; the same text on all ranks.

    Collective: every rank must call it, with its own summed loss and `origin`, a description of its batch.
    """
    if runtime.world_size == 1:
        return origin
    own = (bool(own_loss.isfinite()), origin)
    found = runtime.all_gather(own, "finding the rank of a non-finite loss")
    bad = [rank for rank, (finite, _) in enumerate(found) if not finite]
    if not bad:  # only their sum overflows
        return f"all ranks together: {found[0][1]}; ..."
    named = "; ".join(f"rank {rank}: {found[rank][1]}" for rank in bad[:4])
    return named + (f"; and ranks {', '.join(map(str, bad[4:]))}" if bad[4:] else "")


def raise_on_all_ranks(runtime: Runtime, failure: BaseException | None) -> None:
    """Raise on all ranks if some could not read their data: StopRequested if any was stopped, else DataError.

    Collective: every rank must call it, with its own failure or None.
    """
    STOPPED, FAILED = 2, 1
    code = 0 if failure is None else STOPPED if isinstance(failure, StopRequested) else FAILED
    highest = runtime.all_reduce_max(code, "sharing data failures")
    if highest == STOPPED:
        raise StopRequested("stop requested") from failure
    if highest == FAILED:
        raise DataError(gather_failures(runtime, failure, may_skip=False)[1]) from failure


def gather_failures(
    runtime: Runtime, failure: BaseException | None, may_skip: bool
) -> tuple[dict[str, str], str | None]:
    """Gather all ranks' data failures: ({bad shard: reason}, first other failure or None), the same on all ranks.

    Collective: every rank must call it, with its own failure or None. With `may_skip` False a bad shard counts as
    any other failure.
    """
    own = {"error": str(failure) or type(failure).__name__} if failure else {}
    if may_skip and isinstance(failure, BadShard):
        own["shard"] = failure.shard
    failures = runtime.all_gather(own, "gathering data failures")
    shards = {f["shard"]: f["error"] for f in failures if "shard" in f}
    return shards, next((f["error"] for f in failures if "error" in f and "shard" not in f), None)
