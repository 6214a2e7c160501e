"""Run a function on several ranks, which form a gloo group, as torchrun would start them; or one script by itself."""

import contextlib
import gc
import importlib
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
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


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """What `function(runtime, *args)` returns on each rank. An exception there fails the test here."""
    # Pickled here, because torch's own pickling shares memory that is freed when its process exits. The environment is
    # sent along, because the fork server has that of the test that started it.
    sent = pickle.dumps((dict(os.environ), args))
    with tempfile.TemporaryDirectory() as folder:
        pipes = [FORKSERVER.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            FORKSERVER.Process(target=_child, args=(rank, world_size, folder, sender, function, sent, timeout))
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process, (_, sender) in zip(processes, pipes):
            process.start()
            sender.close()
        results = []
        try:
            for rank, (receiver, _) in enumerate(pipes):
                assert receiver.poll(timeout + 30), f"rank {rank} of {world_size} did not answer"
                try:
                    results.append(pickle.loads(receiver.recv_bytes()))
                except EOFError:
                    results.append((False, f"rank {rank} of {world_size} died"))
        finally:
            for process in processes:
                process.join(0 if len(results) < world_size else 30)
                process.kill()
        failures = [value for fine, value in results if not fine]
        assert not failures, "\n".join(failures)
        return [value for _, value in results]


def _child(
    rank: int,
    world_size: int,
    folder: str,
    sender: Connection,
    function: Callable[..., Any],
    sent: bytes,
    timeout: float,
) -> None:
    _prepare()
    environment, args = pickle.loads(sent)
    os.environ.clear()
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    if world_size > 1:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{Path(folder) / 'store'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
    runtime = Runtime(torch.device("cpu"), torch.float32, "test", 0, rank, rank, world_size)
    try:
        answer = True, function(runtime, *args)
    except Exception:
        answer = False, f"rank {rank}: {traceback.format_exc()}"
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
