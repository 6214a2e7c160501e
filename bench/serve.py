"""The server under load, over HTTP: `python -m bench.serve`, and with `--hostile` clients that misbehave.

The server is `scripts.chat_web` in a process of its own, with a random model of the given sizes, or with yours
(`--source=sft`). For --seconds, each of --clients sends one request after the other and reads the answers as streams.

With `--hostile` some clients do that; others disconnect early, send garbage, too much, nothing, a byte at a time, or do
not read. The run fails if the server exits or writes a traceback, its memory grows by more than 5% after the first
half, /health takes longer than 100 ms, a request is left over, or a stream ends early. `machine_late` is how late this
program was woken from sleep: if it is not near zero, other programs used the machine.

    python -m bench.serve --clients=16 --seconds=30 --source=sft
    python -m bench.serve --hostile --clients=64 --seconds=300 --source=sft
"""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import _run
from bench._clients import Seen, honest_client, hostile_client, structures
from bench._common import Flags, model_config, starter_texts
from bench._run import Result
from nanochat.checkpoint.runs import run_dir
from nanochat.checkpoint.saving import save_checkpoint
from nanochat.common import UserError
from nanochat.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer
from scripts import _cli

HEALTH_SECONDS = 0.1
GROWTH = 1.05


@dataclass
class ServeFlags(Flags):
    """Sizes of the model and the load."""

    seconds: float = 10.0
    """Duration of the load."""
    clients: int = 8
    """Concurrent clients."""
    max_tokens: int = 64
    """Longest answer in tokens."""
    source: str = ""
    """Serve your own model: base, sft or rl; empty: a random one of the given sizes."""
    chars: int = 500_000
    """Characters of text to train a random model's vocabulary on."""
    hostile: bool = False
    """Add misbehaving clients, and fail if the server breaks under them."""


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[bytes]
    port: int
    errors: Path

    def get(self, path: str) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    @property
    def memory(self) -> int:
        """Resident bytes of the process and its replicas."""
        own = [self.process.pid, *children(self.process.pid)]
        return sum(1024 * int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) for pid in own)


def children(pid: int) -> list[int]:
    return [int(p) for path in Path(f"/proc/{pid}/task").glob("*/children") for p in path.read_text().split()]


class Watch(threading.Thread):
    """Measures the server's health checks and memory four times a second."""

    def __init__(self, served: Served) -> None:
        super().__init__(daemon=True)
        self.served, self.stopped = served, threading.Event()
        self.began = time.monotonic()
        self.health: list[float] = []  # seconds that /health took
        self.late: list[float] = []  # seconds by which this thread was woken late
        self.memory: list[tuple[float, int]] = []  # (seconds since the start, bytes)
        self.failed = ""

    def run(self) -> None:
        sent = time.perf_counter()
        while not self.stopped.wait(0.25):
            self.late.append(time.perf_counter() - sent - 0.25)
            sent = time.perf_counter()
            try:
                fine = self.served.get("/health") == {"status": "ok"}
            except (OSError, ValueError) as error:
                fine, self.failed = False, f"/health: {error!r}"
            self.health.append(time.perf_counter() - sent)
            self.failed = self.failed or ("" if fine else "/health is not ok")
            with contextlib.suppress(OSError, IndexError):
                self.memory.append((time.monotonic() - self.began, self.served.memory))
            sent = time.perf_counter()

    def growth(self, seconds: float) -> float:
        """Peak memory of the last quarter of the run, relative to the third; the first half is warm-up."""
        quarters: list[list[int]] = [[], [], [], []]
        for at, held in self.memory:
            quarters[min(3, int(4 * at / max(seconds, 1e-9)))].append(held)
        return max(quarters[3] or [1]) / max(quarters[2] or [1])


@contextlib.contextmanager
def server(flags: ServeFlags, runtime: Runtime) -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="nanochat-serve-") as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        environment = dict(os.environ)
        if not flags.source:
            environment["NANOCHAT_BASE_DIR"] = folder
            tokenizer = RustBPETokenizer.train_from_iterator(starter_texts("train", flags.chars), flags.vocab_size)
            config = model_config(flags)
            save_checkpoint(
                run_dir(Path(folder), "sft", "random"),
                0,
                tokenizer=tokenizer,
                model_state=GPT.create(config).state_dict(),
                meta={"model_config": config.to_dict()},
            )
        errors = Path(folder) / "errors"
        command = [
            sys.executable,
            "-m",
            "scripts.chat_web",
            f"-i={flags.source or 'sft'}",
            f"--port={port}",
            f"--device-type={flags.device_type or runtime.device.type}",
        ]
        with errors.open("wb") as writing:
            process = subprocess.Popen(command, env=environment, cwd=_run.ROOT, stdout=writing, stderr=writing)
        try:
            served = Served(process, port, errors)
            wait_for(served)
            yield served
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def wait_for(served: Served) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and served.process.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            served.get("/health")
            return
        time.sleep(0.1)
    raise UserError(f"the server did not start: {served.errors.read_text()[-500:]}")


async def load(flags: ServeFlags, port: int, seen: Seen) -> None:
    if flags.hostile:
        structures()  # takes a second, in which no client would read
    until = time.monotonic() + flags.seconds
    if flags.hostile:
        clients = [hostile_client(port, number, until, seen) for number in range(flags.clients)]
    else:
        clients = [honest_client(port, number, until, flags.max_tokens, seen) for number in range(flags.clients)]
    await asyncio.gather(*clients)


def percentile(values: list[float], share: float) -> float | None:
    """In milliseconds; None if there are no values."""
    ordered = sorted(values)
    return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def left_over(served: Served) -> dict[str, int]:
    """Requests that still run or wait, up to ten seconds after the last client has gone."""
    found: dict[str, int] = {}
    for _ in range(100):
        stats = served.get("/stats")
        found = {key: stats[key] for key in ("rows_running", "requests_waiting", "requests_under_way")}
        if not any(found.values()):
            break
        time.sleep(0.1)
    return found


def complaints(values: dict[str, Any], served: Served, watch: Watch) -> list[str]:
    """Violated conditions of --hostile."""
    found = [watch.failed] if watch.failed else []
    if values["exit_code"] is not None:
        found.append(f"the server exited with {values['exit_code']}")
    if "Traceback" in served.errors.read_text(errors="replace"):
        found.append("the server wrote a traceback")
    if (values["health_ms_max"] or 0) > 1000 * HEALTH_SECONDS:
        took, late = values["health_ms_max"], values["machine_late_ms_max"]
        found.append(f"/health took {took:.0f} ms (the machine was up to {late:.0f} ms late)")
    if values["memory_growth"] > GROWTH:
        found.append(f"memory grew by {values['memory_growth'] - 1:.1%}")
    if any(values["left_over"].values()):
        found.append(f"left over: {values['left_over']}")
    if values["streams_cut"]:
        found.append(f"{values['streams_cut']} streams ended early")
    return found


def measure(flags: ServeFlags, runtime: Runtime) -> Result:
    seen = Seen()
    sys.setswitchinterval(0.001)  # seconds; the clients share an interpreter with Watch
    with server(flags, runtime) as served:
        asyncio.run(load(ServeFlags(**{**vars(flags), "hostile": False, "seconds": 1.0}), served.port, Seen()))
        watch = Watch(served)
        watch.start()
        began = time.monotonic()
        asyncio.run(load(flags, served.port, seen))
        elapsed = time.monotonic() - began
        watch.stopped.set()
        watch.join()
        values: dict[str, Any] = {
            "tokens_per_second": seen.tokens / elapsed,
            "answers_per_second": seen.whole / elapsed,
            **{
                f"{name}_ms_{word}": percentile(times, share)
                for name, times in (
                    ("first_token", seen.first_token),
                    ("between_tokens", seen.between_tokens),
                    ("health", watch.health),
                    ("machine_late", watch.late),
                )
                for word, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
            },
            "streams_cut": seen.cut,
            "statuses": {str(k): v for k, v in sorted(seen.statuses.items())},
            "actions": dict(seen.actions),
            "exit_code": served.process.poll(),
            "memory_bytes": max((held for _, held in watch.memory), default=None),
            "memory_growth": watch.growth(flags.seconds),
            "left_over": left_over(served),
        }
        values["complaints"] = complaints(values, served, watch)
    rows = [(key, f"{value:.4g}" if isinstance(value, float) else str(value)) for key, value in values.items()]
    result = Result(f"{flags.clients} clients for {flags.seconds:g} s", ("", ""), rows, values)
    if flags.hostile and values["complaints"]:
        result.show()
        raise UserError("; ".join(values["complaints"]))
    return result


def main(argv: Sequence[str] | None = None) -> int:
    return _run.run("serve", ServeFlags, measure, argv)


if __name__ == "__main__":
    _cli.run(main)
