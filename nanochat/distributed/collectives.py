"""What several processes do together: sums, shares, texts. What fails names its rank and what it was doing.

N processes; n numbers in each one's share of a flat tensor, the last shares padded.
"""

import contextlib
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


class CollectiveFailed(RuntimeError):
    """Another process is gone, hangs, or cannot be reached. The message names this rank and the operation."""


@contextlib.contextmanager
def naming(what: str, rank: int | None = None) -> Iterator[None]:
    """Turn the failure of a collective inside into CollectiveFailed."""
    try:
        yield
    except (CollectiveFailed, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        rank = dist.get_rank() if rank is None else rank
        raise CollectiveFailed(f"rank {rank}: {what} failed, another process hangs or is gone ({reason})") from error


def join(backend: str, rank: int, world_size: int, timeout_seconds: float) -> None:
    """Form the process group that torchrun describes in the environment."""
    timeout = timedelta(seconds=timeout_seconds)
    with naming("joining the other processes", rank):
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
        prefix = agree_on_prefix(store, rank, world_size, timeout_seconds)
        dist.init_process_group(
            backend, store=dist.PrefixStore(prefix, store), rank=rank, world_size=world_size, timeout=timeout
        )


def agree_on_prefix(store: Any, rank: int, world_size: int, timeout_seconds: float) -> str:
    """A name that only the processes now alive share.

    torchrun restarts processes on the store that the dead ones used, where their addresses still stand: whoever
    reads one before it is overwritten calls in vain. So rank 0 calls with a fresh word, each other answers with that
    and a word of its own, and goes once it finds its own word among those that rank 0 has heard.
    """
    word, deadline = secrets.token_hex(8), time.monotonic() + timeout_seconds
    heard = {0: word}
    if rank == 0:
        store.set("call", word)
    while len(heard) < world_size:
        if time.monotonic() > deadline:
            raise RuntimeError(f"heard {len(heard)} of {world_size} in {timeout_seconds:g} s")
        if rank > 0 and store.check(["call"]):
            store.set(f"answer{rank}", store.get("call").decode() + " " + word)
            if store.check(["go"]) and word in (words := store.get("go").decode().split()):
                return words[0]
        for other in range(1, world_size) if rank == 0 else ():
            if other not in heard and store.check([f"answer{other}"]):
                call, answer = store.get(f"answer{other}").decode().split()
                if call == word:
                    heard[other] = answer
        time.sleep(0.01)
    store.set("go", " ".join(heard[r] for r in range(world_size)))
    return word


@dataclass
class Pending:
    """A collective under way. What it reads and writes lives as long as this object."""

    what: str
    work: Any
    result: torch.Tensor
    reads: list[torch.Tensor] = field(default_factory=list)
    finish: Callable[[], torch.Tensor] | None = None  # makes the result, where the collective alone does not

    def wait(self) -> torch.Tensor:
        """The result, once it is there."""
        with naming(self.what):
            self.work.wait()
        return self.finish() if self.finish else self.result


def start_all_reduce(tensor: torch.Tensor, what: str) -> Pending:
    """Sum a tensor over all processes, in place."""
    with naming(what):
        return Pending(what, dist.all_reduce(tensor, async_op=True), tensor)


def start_reduce_scatter(flat: torch.Tensor, what: str) -> Pending:
    """Of N * n numbers, to each process the sum of its own n, in a tensor of its own (a reduce-scatter)."""
    N = dist.get_world_size()
    if dist.get_backend() == "gloo":
        # gloo's reduce-scatter is an all-reduce of a copy: N/2 times the traffic, and more than twice the time
        # (dev/LOG.md). Here each gets all pieces of its share and adds them up, in the order of the ranks.
        pieces = torch.empty_like(flat)
        with naming(what):
            work = dist.all_to_all_single(pieces, flat, async_op=True)
        return Pending(what, work, pieces, [flat], lambda: pieces.view(N, -1).sum(0))
    share = flat.new_empty(flat.numel() // N)
    with naming(what):
        return Pending(what, dist.reduce_scatter_single(share, flat, async_op=True), share, [flat])


def start_all_gather(share: torch.Tensor, flat: torch.Tensor, what: str) -> Pending:
    """All processes' n numbers into the N * n of `flat`, of which `share` may be the own part."""
    with naming(what):
        return Pending(what, dist.all_gather_single(flat, share, async_op=True), flat, [share])


def all_gather_texts(text: str, what: str, device: torch.device | str = "cpu", group: Any = None) -> list[str]:
    """The text that each process brought, by rank. As bytes: nothing is unpickled."""
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    with naming(what):
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, torch.tensor([len(data)], device=device), group=group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=device)
        padded[: len(data)] = data
        texts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(texts, padded, group=group)
    return [bytes(t[: int(size)].tolist()).decode() for t, size in zip(texts, sizes)]


class Peers:
    """The processes of a run, agreeing beside the training loop from one other thread, over a group of their own.

    All processes make it, and then call `together` equally often.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, timeout_seconds: float = 1800.0) -> None:
        self.rank, self.world_size = rank, world_size
        # gloo, whatever trains: texts travel between hosts' memories, and wait for no GPU.
        self.group = world_size > 1 and dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))

    def together(self, what: str, action: Callable[[], Any]) -> list[Any]:
        """What `action` returned on each process (it must fit in JSON), once it is done on all.

        If it failed anywhere it fails everywhere: here with its own exception, elsewhere with an OSError.
        """
        if self.world_size == 1:
            return [action()]
        failure = None
        try:
            mine = {"value": action()}
        except BaseException as error:
            mine, failure = {"error": str(error) or type(error).__name__}, error
        try:
            answers = [json.loads(t) for t in all_gather_texts(json.dumps(mine), what, group=self.group)]
        except CollectiveFailed as error:
            raise failure or OSError(str(error)) from error
        if failure:
            raise failure
        for rank, answer in enumerate(answers):
            if "error" in answer:
                raise OSError(f"rank {rank}: {answer['error']}")
        return [answer["value"] for answer in answers]
