"""Collectives whose failures name the rank and the operation.

Used by `Runtime` (all_reduce_sum, broadcast, ...), by DistMuonAdamW (asynchronous collectives on flat tensors) and by
background saves (BackgroundGroup). Shapes: N is the world size, n the elements in each rank's share of a flat tensor.
"""

import contextlib
import faulthandler
import json
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from nanochat.common import UserError, is_out_of_memory


class CollectiveFailed(RuntimeError):
    """Another rank has exited, hangs, or cannot be reached. The message names this rank and the operation."""


@contextlib.contextmanager
def collective_op(name: str, rank: int | None = None) -> Iterator[None]:
    """Turn the failure of a collective inside into CollectiveFailed, which names the operation."""
    try:
        yield
    except (CollectiveFailed, torch.AcceleratorError):  # the latter: of this rank's own GPU
        raise
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        # NCCL's cause, such as a full /dev/shm, follows this line.
        detail = lines[lines.index("Last error:") + 1 :][:1] if "Last error:" in lines else []
        reason = ": ".join(lines[:1] + detail)
        rank = dist.get_rank() if rank is None else rank
        raise CollectiveFailed(f"rank {rank}: {name} failed: another rank hangs or has exited ({reason})") from error


# ---------------------------------------------------------------------------------------------------
# Joining


def init_process_group(device: torch.device, rank: int, world_size: int, timeout_seconds: float, settings: str) -> None:
    """Form the process group that torchrun describes in the environment: NCCL on NVIDIA GPUs, else gloo.

    Collective: every rank must call it. Raises UserError on all ranks if `settings`, a word that describes the rank's
    device and number format, is not the same on all: they would form different groups, or wait for each other.
    """
    cuda = device.type == "cuda"
    if cuda:  # NCCL aborts a process that waits longer than the time-out: print to stderr where it waited
        faulthandler.enable(2)
    timeout = timedelta(seconds=timeout_seconds)
    with collective_op("joining the process group", rank):
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
        nonces = exchange_nonces(store, rank, world_size, timeout_seconds, settings)
        by_rank = [nonce.partition("-")[2] for nonce in nonces]
        if other := next((r for r in range(world_size) if by_rank[r] != by_rank[0]), 0):
            raise UserError(
                f"rank 0 computes on {by_rank[0]} and rank {other} on {by_rank[other]}: give all ranks the same with "
                "--device-type and NANOCHAT_DTYPE, or leave out the machine that differs"
            )
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.PrefixStore(nonces[0], store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if cuda else None,  # NCCL then connects now, and fails now if it cannot
        )


def exchange_nonces(store: Any, rank: int, world_size: int, timeout_seconds: float, settings: str) -> list[str]:
    """Nonces of the ranks alive now, by rank, each ending in "-" and its `settings`. Rank 0's is a fresh store prefix.

    torchrun restarts ranks on the store of the ones that failed, which still holds their addresses: a rank that reads
    a stale address hangs. In this handshake rank 0 publishes its nonce, every other rank answers with that nonce and
    its own, and is done when rank 0's list of all nonces contains its own. Collective: every rank must call it.
    """
    nonce, deadline = f"{secrets.token_hex(8)}-{settings}", time.monotonic() + timeout_seconds
    nonces = {0: nonce}  # by rank; rank 0 collects them
    if rank == 0:
        store.set("nonce", nonce)
    while len(nonces) < world_size:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(nonces)} of {world_size} ranks answered within {timeout_seconds:g} s")
        if rank > 0 and store.check(["nonce"]):
            store.set(f"answer{rank}", store.get("nonce").decode() + " " + nonce)
            if store.check(["nonces"]) and nonce in (all_nonces := store.get("nonces").decode().split()):
                return all_nonces
        for other in range(1, world_size) if rank == 0 else ():
            if other not in nonces and store.check([f"answer{other}"]):
                seen, answer = store.get(f"answer{other}").decode().split()
                if seen == nonce:
                    nonces[other] = answer
        time.sleep(0.01)
    by_rank = [nonces[r] for r in range(world_size)]
    store.set("nonces", " ".join(by_rank))
    return by_rank


# ---------------------------------------------------------------------------------------------------
# Asynchronous collectives on flat tensors


@dataclass
class Pending:
    """A collective under way. Holds its tensors, so that they live until it has ended."""

    name: str
    work: Any
    output: torch.Tensor
    inputs: list[torch.Tensor] = field(default_factory=list)
    finish: Callable[[], torch.Tensor] | None = None  # computes the result from `output`, where that is not it

    def wait(self) -> torch.Tensor:
        """Block until the result is there, and return it. Collective: every rank must call it."""
        with collective_op(self.name):
            self.work.wait()
        return self.finish() if self.finish else self.output


def start_all_reduce(tensor: torch.Tensor, name: str) -> Pending:
    """Start to sum a tensor over all ranks, in place. Collective: every rank must call it."""
    with collective_op(name):
        return Pending(name, dist.all_reduce(tensor, async_op=True), tensor)


def start_reduce_scatter(flat: torch.Tensor, name: str) -> Pending:
    """Start to sum (N * n,) over all ranks; each receives its own share (n,). Collective: every rank must call it."""
    N = dist.get_world_size()
    if dist.get_backend() == "gloo":
        # gloo's reduce-scatter is an all-reduce of a copy: N/2 times the traffic, and more than twice the time
        # (dev/LOG.md). Instead each rank receives all addends of its share and sums them in the order of the ranks.
        addends = torch.empty_like(flat)
        with collective_op(name):
            work = dist.all_to_all_single(addends, flat, async_op=True)
        return Pending(name, work, addends, [flat], lambda: addends.view(N, -1).sum(0))
    share = flat.new_empty(flat.numel() // N)
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # before torch 2.12
    with collective_op(name):
        return Pending(name, reduce_scatter(share, flat, async_op=True), share, [flat])


def start_all_gather(share: torch.Tensor, flat: torch.Tensor, name: str) -> Pending:
    """Start to gather every rank's `share` (n,) into `flat` (N * n,), of which `share` may be a view.

    Collective: every rank must call it.
    """
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.12
    with collective_op(name):
        return Pending(name, all_gather(flat, share, async_op=True), flat, [share])


# ---------------------------------------------------------------------------------------------------
# Small values


def all_gather_json(value: Any, name: str, device: torch.device | str = "cpu", group: Any = None) -> list[Any]:
    """Every rank's value, by rank: as JSON, nothing is unpickled. Collective: every rank of `group` must call it."""
    data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    with collective_op(name):
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, torch.tensor([len(data)], device=device), group=group)
        padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8, device=device)
        padded[: len(data)] = data
        texts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(texts, padded, group=group)
    return [json.loads(bytes(text[: int(size)].tolist())) for text, size in zip(texts, sizes)]


class BackgroundGroup:
    """A second process group, for a thread that works beside the training loop (background saves).

    Collective: every rank must create one, and then call `run_on_all` equally often, from one thread.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, timeout_seconds: float = 1800.0) -> None:
        self.rank, self.world_size = rank, world_size
        # gloo, whatever trains: its tensors are in host memory, and need not wait for a GPU.
        self.group = world_size > 1 and dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))

    def run_on_all(self, name: str, action: Callable[[], Any]) -> list[Any]:
        """Run `action` on every rank and return all results (JSON values), by rank.

        Collective: every rank must call it. If `action` raises on one rank, all fail: that one with its own exception,
        the others with an OSError that names the rank.
        """
        if self.world_size == 1:
            return [action()]
        failure = None
        try:
            outcome = {"value": action()}
        except BaseException as error:
            outcome, failure = {"error": str(error) or type(error).__name__}, error
        try:
            outcomes = all_gather_json(outcome, name, group=self.group)
        except CollectiveFailed as error:
            raise failure or OSError(str(error)) from error
        if failure:
            raise failure
        for rank, other in enumerate(outcomes):
            if "error" in other:
                raise OSError(f"rank {rank}: {other['error']}")
        return [other["value"] for other in outcomes]
