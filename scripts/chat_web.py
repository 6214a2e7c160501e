"""Serve a model: the page and an OpenAI-compatible API, `python -m scripts.chat_web`."""

import contextlib
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from nanochat.common import UserError, say
from nanochat.common.ranges import Range
from nanochat.conversation import Tokenizer
from nanochat.execution import choose_level
from nanochat.gpt import GPT
from nanochat.inference.sampling import SamplingParams
from nanochat.runtime import Runtime
from nanochat.serve.api import ServerMetrics, Settings
from nanochat.serve.hosts import check_allowed, is_loopback
from nanochat.serve.server import create_app
from nanochat.serve.uvicorn_server import Server, limit_pauses, open_sockets, url_host
from scripts import _cli
from scripts._replica import ReplicaConfig, ReplicaPlan, local_pool, remote_pool


@dataclass
class Config(ReplicaConfig):
    """Serve a model: a chat page, and an API for OpenAI clients."""

    num_gpus: Annotated[int, Range(1)] = 1
    """Replicas, one per GPU; on a CPU they share it."""
    workers: Annotated[int, Range(0)] = 0
    """On a CPU: replicas in processes of their own that share the cores; one that dies is replaced. 0: none."""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.8
    """Default of requests; 0 takes the most likely token."""
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50
    """Default of requests; 0 is off."""
    min_p: float = 0.1
    """Default of requests: tokens at least this likely compared with the likeliest; 0 is off."""
    max_tokens: Annotated[int, tyro.conf.arg(aliases=["-m"]), Range(1, unset=-1)] = -1
    """Longest answer in tokens, also of requests for more; -1: what the prompt leaves of the context."""
    port: Annotated[int, tyro.conf.arg(aliases=["-p"]), Range(1, 65535, unset=-1)] = -1
    """Port; -1 takes 8000 or the next free one."""
    host: str = "localhost"
    """Address to listen on; localhost is this machine only, 0.0.0.0 accepts others (then use --api-key-file)."""
    api_key_file: str = ""
    """File of API keys, one a line; requests must send one of them. Empty: no key is required."""
    cors: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Origin of other web pages that may use the API; repeatable."""
    allow_host: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Without keys: a name, besides this machine's, by which clients may address the server; repeatable; * is any."""
    request_seconds: Annotated[float, Range(0.001)] = 300.0
    """Time limit of one request."""
    log_requests: bool = False
    """Log time, path and status of each request. Prompts and answers are never logged."""

    def __post_init__(self) -> None:
        if self.workers and (self.num_gpus > 1 or self.device_type not in ("", "cpu")):
            raise UserError("--workers is for a CPU; on GPUs use --num-gpus, a replica on each")
        check_allowed(self.allow_host, self.cors)
        SamplingParams(self.temperature, self.top_k, min_p=self.min_p)  # raises UserError now


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    keys = read_keys(config.api_key_file)
    if config.python:
        choose_level("")  # raises UserError now if there is no sandbox
    device_type = "cpu" if config.workers else config.device_type
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(each) for each in open_sockets(config.host, config.port)]
        serve(config, keys, sockets, opened.enter_context(Runtime.create(device_type)))
    return 0


def serve(config: Config, keys: list[str], sockets: list[socket.socket], runtime: Runtime) -> None:
    """Load the model, print the address, serve until a signal, finish the active answers."""
    available = torch.cuda.device_count() if runtime.device.type == "cuda" else config.num_gpus
    if config.num_gpus > available:
        raise UserError(f"--num-gpus={config.num_gpus}: this machine has {available}")
    plan = ReplicaPlan.of(config)
    model, tokenizer, meta = plan.load(runtime)
    max_context = model.config.sequence_len
    card = model_card(config.source, model, tokenizer, meta)
    metrics = ServerMetrics()
    if config.workers:
        del model
        pool = remote_pool(plan, config.workers, max_context, metrics.observe)
    else:
        pool = local_pool(plan, config.num_gpus, model, tokenizer, runtime, metrics.observe)
    app = create_app(pool, tokenizer, settings_of(config, keys, plan.model_tag, card), metrics)
    say(f"{runtime.describe()}\n{config.source} model {plan.model_tag}, step {meta['step']}, context {max_context}")
    host, port = sockets[0].getsockname()[:2]
    announce(host if len(sockets) == 1 else "localhost", port, keys)
    limit_pauses()
    Server(app, log_requests=config.log_requests).run(sockets=sockets)


def model_card(
    source: str, model: GPT, tokenizer: Tokenizer, meta: dict[str, Any]
) -> dict[str, str | int | float | None]:
    """Where the model comes from, for the page and /v1/models."""
    progress = meta.get("progress", {})
    return {
        "stage": source,
        "step": meta["step"],
        "parameters": model.num_scaling_params()["total"],
        "layers": model.config.n_layer,
        "tokens": progress.get("tokens"),
        "vocab_size": tokenizer.get_vocab_size(),
        "val_bpb": progress.get("val_bpb"),
    }


def settings_of(
    config: Config, keys: list[str], model_name: str, card: Mapping[str, str | int | float | None]
) -> Settings:
    return Settings(
        model_name=model_name,
        api_keys=keys,
        cors_origins=config.cors,
        allow_hosts=[config.host, *config.allow_host],
        sampling=SamplingParams(config.temperature, config.top_k, min_p=config.min_p),
        max_tokens=None if config.max_tokens < 0 else config.max_tokens,
        request_seconds=config.request_seconds,
        chat_model=config.source != "base",
        card=card,
    )


def announce(host: str, port: int, keys: list[str]) -> None:
    """Print the addresses, and a warning if other machines can use the server without a key."""
    base = f"http://{url_host(host)}:{port}"
    say(f"page: {base}/    API: {base}/v1\nCtrl-C stops the server after finishing active answers")
    if not is_loopback(host) and not keys:
        say("warning: other machines can use this server without a key; require one with --api-key-file=FILE")


def read_keys(path: str) -> list[str]:
    """The lines of the file. Keys are not taken from the command line, which other users can read."""
    if not path:
        return []
    try:
        keys = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file={path}: {error}") from error
    if not keys:
        raise UserError(f"--api-key-file={path}: it is empty")
    return keys


if __name__ == "__main__":
    _cli.run(main, memory_flags="--max-rows, --cache-mib or --prefix-mib")
