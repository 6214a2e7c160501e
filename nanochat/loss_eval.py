"""Bits per byte: the loss in a unit that does not depend on the vocabulary."""

import math
from collections.abc import Iterable

import torch

from nanochat.common import UserError
from nanochat.distributed.rank_checks import raise_on_all_ranks
from nanochat.distributed.signals import StopRequested
from nanochat.gpt import GPT
from nanochat.runtime import Runtime


@torch.no_grad()
def evaluate_bpb(
    model: GPT,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    token_bytes: torch.Tensor,
    runtime: Runtime | None = None,
) -> float:
    """Total loss in bits over total bytes of the target tokens.

    `batches` yields (inputs, targets), each (B, T), -1 = no target; at most `steps` of them are taken.
    `token_bytes` (V,) holds each token's length in bytes; special tokens have 0 and are excluded from both sums.
    With `runtime`, sums over all ranks. Returns inf if there was no byte. Raises on all ranks: DataError if the batches
    of one cannot be read, StopRequested if a signal arrived while it waited for them.
    """
    nats = torch.zeros((), dtype=torch.float64)
    count = torch.zeros((), dtype=torch.float64)
    was_training, failure = model.training, None
    model.eval()
    try:
        for _, (inputs, targets) in zip(range(steps), batches):  # in this order no batch too many is taken
            inputs, targets = inputs.to(model.device), targets.to(model.device)
            losses = model(inputs, targets, loss_reduction="none")  # (B*T,)
            flat = targets.flatten()
            sizes = token_bytes.to(flat.device)[flat.clamp_min(0)] * (flat >= 0)
            # Summed on the CPU: an Apple GPU has no float64.
            nats += (losses * (sizes > 0)).cpu().sum(dtype=torch.float64)
            count += sizes.cpu().sum(dtype=torch.float64)
    except (UserError, OSError, StopRequested) as error:  # must be shared: the other ranks wait for this one's sums
        failure = error
    model.train(was_training)
    if runtime is not None:
        raise_on_all_ranks(runtime, failure)
        if runtime.world_size > 1:
            nats, count = runtime.all_reduce_sum(
                torch.stack([nats, count]).to(runtime.device), "summing the validation loss"
            ).cpu()
    elif failure:
        raise failure
    return nats.item() / (math.log(2) * count.item()) if count.item() else math.inf
