"""Run a function on several ranks, which form a gloo group, as torchrun would start them; or one script by itself."""

import contextlib
import gc
import importlib
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from nanochat import trainer
from nanochat.runtime import Runtime
from nanochat.train import timing

# Children are forked from one process that has imported all slow modules.
FORKSERVER = multiprocessing.get_context("forkserver")
STAGES = ("tok_train", "base_train", "chat_sft", "chat_rl")
FORKSERVER.set_forkserver_preload(["torch", *(f"scripts.{name}" for name in STAGES)])


def join_group(rank: int, world_size: int, store: Path, timeout: float) -> None:
    """Form the gloo group. Collective."""
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    torch.distributed.barrier()  # no rank starts while another may still fail to join


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 60.0,
    join: Callable[[int, int, Path, float], None] = join_group,
) -> list[Any]:
    """What `function(runtime, *args)` returns on each rank. An exception there fails the test here.

    gloo's connections fail now and then when many groups are formed at once on one host; then the group is formed once
    more, with new processes.
    """
    # Pickled here, because torch's own pickling shares memory that is freed when its process exits. The environment is
    # sent along, because the fork server has that of the test that started it.
    sent = pickle.dumps((dict(os.environ), args))
    for _ in range(2):
        answers = _answers_of_ranks(world_size, function, sent, timeout, join)
        if not any(kind == "no group" for kind, _ in answers):
            break
    failures = [value for kind, value in answers if kind != "returned"]
    assert not failures, "\n".join(failures)
    return [value for _, value in answers]


def _answers_of_ranks(
    world_size: int, function: Callable[..., Any], sent: bytes, timeout: float, join: Callable[..., None]
) -> list[tuple[str, Any]]:
    """(kind, value) of each rank. Kinds: returned; raised, no group (tracebacks); silent (dead, or too late)."""
    answers = {rank: ("silent", f"rank {rank} of {world_size} did not answer") for rank in range(world_size)}
    with tempfile.TemporaryDirectory() as folder:
        processes, waiting = [], {}
        for rank in range(world_size):
            receiver, sender = FORKSERVER.Pipe(duplex=False)
            store = Path(folder) / "store"
            process = FORKSERVER.Process(
                target=_child, args=(rank, world_size, store, sender, function, sent, timeout, join)
            )
            process.start()
            sender.close()
            processes.append(process)
            waiting[receiver] = rank
        deadline = time.monotonic() + timeout + 30
        try:
            while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
                for receiver in ready:
                    rank = waiting.pop(receiver)
                    try:
                        answers[rank] = pickle.loads(receiver.recv_bytes())
                    except EOFError:
                        answers[rank] = "silent", f"rank {rank} of {world_size} died"
                    if answers[rank][0] in ("silent", "no group"):  # the others may wait for it in vain
                        deadline = min(deadline, time.monotonic() + 2)
        finally:
            for process in processes:
                process.join(0 if waiting else 30)
                process.kill()
    return [answers[rank] for rank in range(world_size)]


def _child(
    rank: int,
    world_size: int,
    store: Path,
    sender: Connection,
    function: Callable[..., Any],
    sent: bytes,
    timeout: float,
    join: Callable[..., None],
) -> None:
    _prepare()
    environment, args = pickle.loads(sent)
    os.environ.clear()
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    runtime = Runtime(torch.device("cpu"), torch.float32, "test", 0, rank, rank, world_size)
    kind = "no group"
    try:
        if world_size > 1:
            join(rank, world_size, store, timeout)
        kind = "raised"
        answer = "returned", function(runtime, *args)
    except Exception:
        answer = kind, f"rank {rank}: {traceback.format_exc()}"
    sender.send_bytes(pickle.dumps(answer))
    runtime.close()


def start_script(name: str, argv: list[str], base: Path) -> BaseProcess:
    """Start a stage's script with these flags in a process of its own, forked with all modules loaded.

    Its output goes to log.txt in the base folder.
    """
    process = FORKSERVER.Process(target=_run_script, args=(name, argv, str(base), dict(os.environ)))
    process.start()
    return process


def _run_script(name: str, argv: list[str], base: str, environment: dict[str, str]) -> None:
    _prepare()
    os.environ.clear()
    os.environ |= environment | {"NANOCHAT_BASE_DIR": base}
    handle = os.open(Path(base) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    raise SystemExit(importlib.import_module(f"scripts.{name}").main(argv))


def _prepare() -> None:
    """Make a forked process quick, as conftest.py does for runs in this one."""
    gc.freeze()  # collecting garbage would copy all inherited memory, half a second per process
    trainer.frozen_objects = contextlib.nullcontext  # would thaw it
    measure, short = timing.measure_peak_flops, 0.001
    timing.measure_peak_flops = lambda runtime, seconds=short: measure(runtime, min(seconds, short))
    torch.set_num_threads(1)
