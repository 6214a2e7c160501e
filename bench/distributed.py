"""Optimizer time and memory at world sizes 1, 2 and 4, with one thread per rank: `python -m bench.distributed`.

One row per world size: seconds of an update, seconds of a whole training step on a fixed global batch, and bytes of
optimizer state per rank. Two ranks of one thread should take little longer per step than one rank of two threads.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from bench import _run
from bench._common import Flags, model_config, sample_in_turn, tensor_bytes
from bench._run import Result
from nanochat.common import UserError
from nanochat.gpt import GPT
from nanochat.planning.hardware import Gpu
from nanochat.planning.memory import memory_by_kind
from nanochat.runtime import Runtime
from nanochat.train.build import make_optimizer, random_batch
from nanochat.train.config import TrainConfig
from nanochat.train.schedules import ScheduleConfig
from nanochat.train.step import TrainStep
from scripts import _cli


@dataclass
class DistributedFlags(Flags):
    processes: str = "1,2,4"
    """World sizes to compare, with one thread per rank; the first row is one rank with as many threads as the machine
    has cores."""
    rounds_of_all: int = 2
    """Repetitions of all cases, interleaved; medians are shown."""


def measure(flags: DistributedFlags, runtime: Runtime) -> Result:
    """Run every case in turn, and tabulate the results."""
    if runtime.world_size > 1 or runtime.device.type != "cpu":
        raise UserError(
            "bench.distributed starts its own ranks, on a CPU: run it without torchrun, with --device-type=cpu"
        )
    try:
        counts = [int(count) for count in flags.processes.split(",")]
    except ValueError:
        raise UserError(f"--processes must be comma-separated numbers, got {flags.processes!r}") from None
    if flags.batch < max(counts):
        raise UserError(f"--batch {flags.batch} leaves some of {max(counts)} ranks without a row")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cases = [(1, cores), *((count, 1) for count in counts)]
    found: dict[tuple[int, int], list[dict[str, Any]]] = {case: [] for case in cases}
    for _ in range(flags.rounds_of_all):
        for case in found:
            found[case].append(run_ranks(flags, *case))
    results = {case: {key: median(r[key] for r in rounds) for key in rounds[0]} for case, rounds in found.items()}
    whole = results[cases[0]]
    values: dict[str, Any] = {"cores": cores, "processes": {}}
    rows = []
    for (count, threads), r in results.items():
        r["state_share"] = r["state_bytes"] / whole["state_bytes"]
        r["speed"] = whole["step_seconds"] / r["step_seconds"]
        values["processes"][f"{count}x{threads}"] = r
        rows.append(
            (
                f"{count} x {threads}",
                f"{1e3 * r['update_seconds']:.1f}",
                f"{1e3 * r['step_seconds']:.1f}",
                f"{r['speed']:.2f}",
                f"{r['state_bytes'] / 2**20:.2f}",
                f"{r['state_share']:.3f}",
                f"{r['measured_bytes'] / r['planned_bytes']:.3f}",
            )
        )
    columns = ("n x threads", "update ms", "step ms", "speed", "state MiB", "share", "held/planned")
    return Result("sharded optimizer", columns, rows, values)


def run_ranks(flags: DistributedFlags, count: int, threads: int) -> dict[str, Any]:
    """Run `one_rank` on `count` ranks; returns the maximum of each of their results."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
    }
    code = "import sys, bench.distributed as b; b.one_rank(sys.argv[1])"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(asdict(flags))],
            cwd=_run.ROOT,
            text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(count)
    ]
    outputs = [process.communicate() for process in ranks]
    for process, (_, error) in zip(ranks, outputs):
        if process.returncode:
            last = (error.strip() or "no message").splitlines()[-1]
            raise UserError(f"bench.distributed with {count} ranks: {last}")
    found = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    return {key: max(r[key] for r in found) for key in found[0]}


def one_rank(flags_json: str) -> None:
    """Measure on one rank, and print the result as JSON."""
    flags = DistributedFlags(**json.loads(flags_json))
    with Runtime.create("cpu", flags.dtype) as runtime:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        print(json.dumps(measure_rank(flags, runtime)))


def measure_rank(flags: Flags, runtime: Runtime) -> dict[str, float]:
    """Time updates and whole steps; measure this rank's memory and compare it with the planner's prediction."""
    config = model_config(flags)
    model = GPT.create(config, runtime.device, runtime.dtype)
    optimizer = make_optimizer(model, TrainConfig().optimizer_config(flags.recipe), runtime, 1e-3, 0.1)
    own = -(-flags.batch // runtime.world_size)
    step = TrainStep(model, optimizer, runtime, ScheduleConfig(1000), own, model.loss)
    batch = random_batch(flags.batch, flags.seq_len, config.vocab_size, runtime)
    step(batch)
    step.accumulate(batch)
    gradients = [p.grad for p in model.parameters()]
    memory = {
        "weights": tensor_bytes(model.parameters()),
        "gradients": tensor_bytes(gradients),
        "optimizer": tensor_bytes(t for state in optimizer.state.values() for t in state.values()),
    }
    kinds = memory_by_kind(config, machine(runtime), runtime.world_size, own)
    kept = [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def update() -> None:
        for p, grad in zip(model.parameters(), kept, strict=True):
            p.grad = grad
        optimizer.step()

    # A fixed number of rounds: ranks that each timed their own would do different numbers of collectives and hang.
    rounds = max(3, round(flags.seconds * 4))
    times = sample_in_turn({"update": update, "step": lambda: step(batch)}, 0.0, runtime, least=rounds)
    return {
        "update_seconds": median(times["update"]),
        "step_seconds": median(times["step"]),
        "state_bytes": memory["optimizer"],
        "planned_state_bytes": kinds["optimizer"],
        "measured_bytes": sum(memory.values()),
        "planned_bytes": sum(kinds[kind] for kind in memory),
    }


def machine(runtime: Runtime) -> Gpu:
    """This machine as the planner sees it; only the dtype matters here."""
    return Gpu("this machine", 0.0, 1.0, None, 0.0, None, str(runtime.dtype).removeprefix("torch."), "cpu")


def main(argv: Sequence[str] | None = None) -> int:
    return _run.run("distributed", DistributedFlags, measure, argv)


if __name__ == "__main__":
    _cli.run(main)
