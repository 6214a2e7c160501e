"""How chat_web builds its replicas: in its own process, or as `python -m scripts._replica PLAN FD` in a child."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, Literal

import torch
import tyro

from nanochat.checkpoint.folder import step_path
from nanochat.checkpoint.runs import run_dir
from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, get_base_dir
from nanochat.common.ranges import Range
from nanochat.gpt import GPT
from nanochat.inference.tools import DEFAULT_TOOLS, WITH_PYTHON
from nanochat.runtime import Runtime
from nanochat.serve.remote_service import RemoteService, serve_replica
from nanochat.serve.service import MIB, Observe, Service, WorkerPool
from scripts import _cli


@dataclass
class ReplicaConfig(_cli.ModelConfig):
    """The flags of chat_web that each of its replicas needs."""

    source: Annotated[Literal["base", "sft", "rl"], tyro.conf.arg(aliases=["-i"])] = "sft"
    """Model to serve: base, sft or rl."""
    max_rows: Annotated[int, Range(1)] = 32
    """Batch slots: sequences decoded together."""
    max_waiting: Annotated[int, Range(1)] = 64
    """Requests in the queue; more are refused with 429."""
    cache_mib: Annotated[int, Range(1)] = 1024
    """Memory for the keys and values of the batch slots, per replica."""
    prefix_mib: Annotated[int, Range(0)] = 256
    """Memory for the prefix cache of prompts, per replica."""
    python: bool = False
    """Let the model run Python in the sandbox (dev/SANDBOX.md), besides the calculator."""
    int8: bool = False
    """Decode with int8 weights, on a CPU: faster for models larger than its cache."""


@dataclass
class ReplicaPlan(ReplicaConfig):
    """The model and the sizes of its Service. Passed to a child process as JSON."""

    threads: int = 0  # of a replica in a process of its own
    weights: str = ""  # SHA-256 of their file, once loaded

    @classmethod
    def of(cls, config: ReplicaConfig) -> "ReplicaPlan":
        return cls(**{f.name: getattr(config, f.name) for f in fields(ReplicaConfig)})

    def load(self, runtime: Runtime) -> tuple[Any, Any, dict[str, Any]]:
        """(model, tokenizer, meta). Later calls, for other GPUs and processes, load the same step. Raises UserError if
        its weights have been replaced since."""
        model, tokenizer, meta = load_model(self.source, runtime, model_tag=self.model_tag, step=self.step)
        if self.weights not in ("", meta["weights"]):
            path = step_path(run_dir(get_base_dir(to_write=False), self.source, self.model_tag), meta["step"])
            raise UserError(f"{path} has changed since this server was started; restart the server")
        self.model_tag, self.step, self.weights = meta["model_tag"], meta["step"], meta["weights"]
        return model, tokenizer, meta

    def service(self, model: Any, tokenizer: Any, observe: Observe) -> Service:
        return Service(
            model,
            tokenizer,
            max_rows=self.max_rows,
            max_waiting=self.max_waiting,
            memory_bytes=self.cache_mib * MIB,
            prefix_bytes=self.prefix_mib * MIB,
            int8=self.int8,
            tools=WITH_PYTHON if self.python else DEFAULT_TOOLS,
            observe=observe,
        )

    def command(self) -> list[str]:
        """Starts a replica in a child process; RemoteService appends the file descriptor of its socket."""
        return [sys.executable, "-m", "scripts._replica", json.dumps(asdict(self))]


def local_pool(
    plan: ReplicaPlan, size: int, model: GPT, tokenizer: Any, runtime: Runtime, observe: Observe
) -> WorkerPool:
    """Replicas in this process, one per GPU. `model` is on the first."""

    def make(index: int) -> Service:
        own = model
        if runtime.device.type == "cuda" and index > 0:
            own, _, _ = plan.load(replace(runtime, device=torch.device("cuda", index)))
        return plan.service(own, tokenizer, observe)

    return WorkerPool(make, size)


def remote_pool(plan: ReplicaPlan, size: int, max_context: int, observe: Observe) -> WorkerPool:
    """Replicas in processes of their own, which share the CPU's threads."""
    plan.threads = max(1, torch.get_num_threads() // size)
    max_requests = plan.max_rows + plan.max_waiting
    return WorkerPool(lambda index: RemoteService(plan.command(), max_context, max_requests, observe), size)


def main(argv: Sequence[str] | None = None) -> int:
    plan_json, fd = sys.argv[1:] if argv is None else argv
    plan = ReplicaPlan(**json.loads(plan_json))
    torch.set_num_threads(plan.threads)
    with Runtime.create("cpu") as runtime:
        model, tokenizer, _ = plan.load(runtime)
        serve_replica(lambda observe: plan.service(model, tokenizer, observe), int(fd))
    return 0


if __name__ == "__main__":
    _cli.run(main)
