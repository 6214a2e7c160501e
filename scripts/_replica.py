"""Building the service behind chat_web, in its own process or in one that is started for it."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nanochat.checkpoint.folder import step_path
from nanochat.checkpoint.manifest import Manifest
from nanochat.checkpoint_manager import load_model, run_dir
from nanochat.common import UserError, get_base_dir
from nanochat.inference.tools import DEFAULT_TOOLS, WITH_PYTHON
from nanochat.runtime import Runtime
from nanochat.serve.replica import serve_replica
from nanochat.serve.service import MIB, Service
from scripts import _cli


@dataclass
class ReplicaPlan:
    """Which model, and how much of it at once. Travels to a child process as JSON."""

    source: str
    model_tag: str
    step: int | None
    max_rows: int
    max_waiting: int
    cache_mib: int
    prefix_mib: int
    int8: bool
    python: bool
    threads: int = 0  # that a replica in a process of its own may use
    weights: str = ""  # their file's hash, once they were loaded

    def load(self, runtime: Runtime) -> tuple[Any, Any, dict[str, Any]]:
        """(model, tokenizer, meta). What is loaded later, on other GPUs and in other processes, is the same: its step
        is kept, and UserError raised if the run has been replaced by another."""
        base_dir = get_base_dir()
        model, tokenizer, meta = load_model(
            self.source,
            runtime,
            base_dir=base_dir,
            model_tag=self.model_tag,
            step=self.step,
            compute_dtype=runtime.dtype,
        )
        path = step_path(run_dir(base_dir, self.source, self.model_tag), meta["step"])
        weights = Manifest.read(path).files["model.safetensors"]["sha256"]
        if self.weights not in ("", weights):
            raise UserError(f"{path} is not what this server was started with: start the server anew")
        self.step, self.weights = meta["step"], weights
        return model, tokenizer, meta

    def service(self, model: Any, tokenizer: Any, observe: Callable[[str, float], None]) -> Service:
        tools = WITH_PYTHON if self.python else DEFAULT_TOOLS
        return Service(
            model,
            tokenizer,
            max_rows=self.max_rows,
            max_waiting=self.max_waiting,
            memory_bytes=self.cache_mib * MIB,
            prefix_bytes=self.prefix_mib * MIB,
            int8=self.int8,
            tools=tools,
            observe=observe,
        )

    def command(self) -> list[str]:
        """What starts a replica; the number of its socket is to follow."""
        return [sys.executable, "-m", "scripts._replica", json.dumps(asdict(self))]


def main(argv: Sequence[str] | None = None) -> int:
    text, number = sys.argv[1:] if argv is None else argv
    plan = ReplicaPlan(**json.loads(text))
    torch.set_num_threads(plan.threads)
    with Runtime.create("cpu") as runtime:
        model, tokenizer, _ = plan.load(runtime)
        serve_replica(lambda observe: plan.service(model, tokenizer, observe), int(number))
    return 0


if __name__ == "__main__":
    _cli.run(main)
