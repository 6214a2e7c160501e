"""Serve a model: the page and an OpenAI-compatible API, `python -m scripts.chat_web`."""

import errno
import gc
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from nanochat.checkpoint_manager import find_run
from nanochat.common import UserError, get_base_dir, say
from nanochat.execution import choose_level
from nanochat.inference.sampling import SamplingParams
from nanochat.ranges import Range
from nanochat.runtime import Runtime
from nanochat.serve.replica import RemoteService
from nanochat.serve.server import ServerMetrics, Settings, create_app
from nanochat.serve.service import Service, WorkerPool
from nanochat.serve.uvicorn_server import Server
from scripts import _cli
from scripts._replica import ReplicaPlan

USUAL_PORT = 8000
PORTS_TRIED = 20


@dataclass
class Config:
    """Serve a model: a page to talk to it, and the API that every OpenAI client speaks."""

    num_gpus: Annotated[int, Range(1)] = 1
    """Replicas: one for each GPU; on a CPU they share it."""
    workers: Annotated[int, Range(0)] = 0
    """On a CPU: replicas in processes of their own, sharing the cores; one that dies is replaced. 0: none."""
    source: Annotated[Literal["base", "sft", "rl"], tyro.conf.arg(aliases=["-i"])] = "sft"
    """Which model: base, sft or rl."""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.8
    """Unless a request says otherwise; 0 takes the most likely token."""
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50
    """Unless a request says otherwise; 0 is off."""
    max_tokens: Annotated[int, tyro.conf.arg(aliases=["-m"]), Range(1)] = 512
    """Longest answer, unless a request says otherwise."""
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""
    """Tag of the run; empty takes the latest."""
    step: Annotated[int, tyro.conf.arg(aliases=["-s"])] = -1
    """Its step; -1 takes the last."""
    port: Annotated[int, tyro.conf.arg(aliases=["-p"]), Range(1, 65535, unset=-1)] = -1
    """Port; -1 is 8000, or the next one that is free."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets others in, who should then need a key."""
    device_type: str = ""
    """cuda, mps or cpu; empty picks the best there is."""
    api_key_file: str = ""
    """File with the keys, one a line, of which requests must bring one; empty asks for none."""
    cors: list[str] = field(default_factory=list)
    """Origins of other pages that may use the API."""
    max_rows: Annotated[int, Range(1)] = 32
    """Sequences decoded together."""
    max_waiting: Annotated[int, Range(1)] = 64
    """Requests that may wait; more are told to come again later."""
    cache_mib: Annotated[int, Range(1)] = 1024
    """Memory for keys and values of the sequences decoded together, for each replica."""
    prefix_mib: Annotated[int, Range(0)] = 256
    """Memory for known beginnings of prompts, for each replica."""
    python: bool = False
    """Let the model run Python, in the sandbox (dev/SANDBOX.md); without it there is the calculator."""
    int8: bool = False
    """Decode with weights of eight bits, on a CPU: faster for models too large for its cache."""
    request_seconds: Annotated[float, Range(0.001)] = 300.0
    """Longest time for one request."""
    log_requests: bool = False
    """Log a line for each request: time, path, status. What was said is never logged."""

    def __post_init__(self) -> None:
        if self.workers and (self.num_gpus > 1 or self.device_type not in ("", "cpu")):
            raise UserError("--workers is for a CPU; on GPUs, --num-gpus has a replica on each")
        try:
            SamplingParams(self.temperature, self.top_k)
        except ValueError as error:
            raise UserError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    keys = read_keys(config.api_key_file)
    if config.python:
        choose_level("")  # where there is no sandbox, say so now
    device_type = "cpu" if config.workers else config.device_type
    with open_socket(config.host, config.port) as listening, Runtime.create(device_type) as runtime:
        serve(config, keys, listening, runtime)
    return 0


def serve(config: Config, keys: list[str], listening: socket.socket, runtime: Runtime) -> None:
    """Load the model, say where it is served, serve until a signal comes, finish what is under way."""
    run = find_run(get_base_dir(), config.source, config.model_tag or None)
    there = torch.cuda.device_count() if runtime.device.type == "cuda" else config.num_gpus
    if config.num_gpus > there:
        raise UserError(f"--num-gpus={config.num_gpus}: this machine has {there}")
    step = None if config.step < 0 else config.step
    plan = ReplicaPlan(
        config.source,
        run.name,
        step,
        config.max_rows,
        config.max_waiting,
        config.cache_mib,
        config.prefix_mib,
        config.int8,
        config.python,
    )
    model, tokenizer, meta = plan.load(runtime)
    context = model.config.sequence_len
    metrics = ServerMetrics()

    def make(index: int) -> Service:
        own = model
        if runtime.device.type == "cuda" and index > 0:
            own, _, _ = plan.load(replace(runtime, device=torch.device("cuda", index)))
        return plan.service(own, tokenizer, metrics.observe)

    def make_process(index: int) -> RemoteService:
        return RemoteService(plan.command(), context, config.max_rows + config.max_waiting, metrics.observe)

    if config.workers:
        del model
        plan.threads = max(1, torch.get_num_threads() // config.workers)
        pool = WorkerPool(make_process, config.workers)
    else:
        pool = WorkerPool(make, config.num_gpus)
    settings = Settings(
        model_name=run.name,
        api_keys=keys,
        cors_origins=config.cors,
        temperature=config.temperature,
        top_k=config.top_k,
        max_tokens=config.max_tokens,
        request_seconds=config.request_seconds,
        most_tokens=max(config.max_tokens, context),
        answers=config.source != "base",
    )
    app = create_app(pool, tokenizer, settings, metrics)
    host, port = listening.getsockname()[:2]
    shown = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::1", "::") else host
    say(
        f"{runtime.describe()}\n{config.source} model {run.name}, step {meta['step']}, context "
        f"{context}\ntalk to it: http://{shown}:{port}/    API: http://{shown}:{port}/v1\n"
        "Ctrl-C stops it; what is under way is finished first"
    )
    if host not in ("127.0.0.1", "::1") and not keys:
        say("warning: others can reach this server and need no key; --api-key-file=FILE asks for one")
    keep_pauses_short()
    Server(app, log_requests=config.log_requests).run(sockets=[listening])


def keep_pauses_short() -> None:
    """All threads share one interpreter, and whoever asks for the next token must not wait for the others."""
    gc.collect()
    gc.freeze()  # what was loaded stays: looking through it again and again stops all threads for 0.2 s each time
    gc.set_threshold(2_000, 10, 50)  # a look at 20,000 objects takes some ten milliseconds
    sys.setswitchinterval(0.001)  # seconds for which a thread may keep the others waiting


def read_keys(path: str) -> list[str]:
    """The lines of the file; keys never come from the command line, where others could read them."""
    if not path:
        return []
    try:
        keys = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file={path}: {error}") from error
    if not keys:
        raise UserError(f"--api-key-file={path}: it is empty")
    return keys


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket. A port that was asked for must be free; otherwise the next free one is taken."""
    candidates = [port] if port != -1 else range(USUAL_PORT, USUAL_PORT + PORTS_TRIED)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in candidates:
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, candidate))
            listening.listen(2048)
            return listening
        except OSError as error:
            listening.close()
            taken = error.errno == errno.EADDRINUSE
            if port != -1:
                by = f", by {holder}" if taken and (holder := who_listens(candidate)) else ""
                raise UserError(
                    f"cannot listen on {host}:{candidate} ({error.strerror}{by}); give another --port, "
                    "or none for a free one"
                ) from error
            if not isinstance(error, PermissionError) and not taken:
                raise UserError(f"cannot listen on {host}: {error.strerror}") from error
    raise UserError(f"no port from {USUAL_PORT} to {USUAL_PORT + PORTS_TRIED - 1} is free; give one with --port")


def who_listens(port: int) -> str:
    """`python (process 1234)`, as far as Linux tells; empty elsewhere."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
        except OSError:
            continue
        inodes |= {row[9] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(Path(fd).readlink().as_posix() in {f"socket:[{i}]" for i in inodes} for fd in process.glob("fd/*")):
                return f"{(process / 'comm').read_text().strip()} (process {process.name})"
        except OSError:
            continue
    return ""


if __name__ == "__main__":
    _cli.run(main)
