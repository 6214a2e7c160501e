"""Where a run happens: device, number format, processes, seed. Made once in main(), closed once.

Everything that depends on the machine is decided here and handed down as a value, so no other module
asks the environment or keeps a global dtype.
"""

import ctypes
import gc
import json
import os
import platform
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nanochat.common import UserError, say, warn
from nanochat.distributed.collectives import all_gather_texts, collective_op, init_process_group

IMPORTED = time.perf_counter()
TIMEOUT_SECONDS = 1800.0  # the longest that one process may leave the others waiting, in an evaluation for instance
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Runtime:
    """One process's place in the run. `rank` counts all processes, `local_rank` those on this host."""

    device: torch.device
    dtype: torch.dtype  # of activations and matrix products; weights and optimizer state stay fp32
    dtype_reason: str
    seed: int
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    timeout_seconds: float = TIMEOUT_SECONDS  # how long processes wait for each other before they give up

    @classmethod
    def create(
        cls, device_type: str = "", dtype: str = "", seed: int = 42, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> "Runtime":
        """Pick device and dtype (empty = the best there is), join the process group under torchrun.

        Raises UserError for a device that is not there or an unknown dtype.
        """
        end_with_launcher()
        device_type = pick_device_type(device_type)
        rank, local_rank, world_size = (
            int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))
        )
        if device_type == "mps" and world_size > 1:
            raise UserError("an Apple GPU trains in one process: leave torchrun out, or give --device-type=cpu")
        device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device(device_type)
        if device_type == "cuda":
            torch.cuda.set_device(device)
        elif device_type == "cpu":
            keep_freed_memory()
        chosen, reason = pick_dtype(device_type, dtype or os.environ.get("NANOCHAT_DTYPE", ""))
        if world_size > 1 and not dist.is_initialized():
            init_process_group("nccl" if device_type == "cuda" else "gloo", rank, world_size, timeout_seconds)
        seed_everything(seed)
        return cls(device, chosen, reason, seed, rank, local_rank, world_size, timeout_seconds)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which prints and writes for all."""
        return self.rank == 0

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled up: float16 gradients would underflow otherwise."""
        return self.dtype == torch.float16

    def print0(self, text: str) -> None:
        """Print on rank 0 only."""
        if self.is_main:
            say(text)

    def warn0(self, message: str) -> None:
        """Warn on rank 0 only, of something that all ranks know."""
        if self.is_main:
            warn(message)

    def error0(self, text: str) -> None:
        """Print on rank 0's standard error only, what all ranks know."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    # Collectives. With one rank each returns its argument, or what it computes from it, without communication.

    def all_reduce_sum(self, value: torch.Tensor, name: str) -> torch.Tensor:
        """Sum a tensor over all ranks, in place. Collective: every rank must call it.

        `name` identifies the call in time-out errors, here and below.
        """
        if self.world_size > 1:
            with collective_op(name):
                dist.all_reduce(value)
        return value

    def all_reduce_max(self, value: float, name: str) -> float:
        """Maximum of `value` over all ranks. Collective: every rank must call it."""
        if self.world_size == 1:
            return value
        shared = torch.tensor(float(value), device=self.device)
        with collective_op(name):
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return float(shared)

    def all_gather(self, value: torch.Tensor, name: str) -> list[Any]:
        """Every rank's tensor (one shape) as nested lists, by rank. Collective: every rank must call it."""
        if self.world_size == 1:
            return [value.tolist()]
        gathered = [torch.empty_like(value) for _ in range(self.world_size)]
        with collective_op(name):
            dist.all_gather(gathered, value)
        return [values.tolist() for values in gathered]

    def all_gather_text(self, text: str, name: str) -> list[str]:
        """Every rank's text, by rank. Collective: every rank must call it."""
        return [text] if self.world_size == 1 else all_gather_texts(text, name, self.device)

    def broadcast(self, compute: Callable[[], Any], name: str) -> Any:
        """Call `compute` on rank 0 only and return its result (a JSON value) on all ranks; a UserError likewise.

        Collective: every rank must call it.
        """
        if self.world_size == 1:
            return compute()
        outcome: dict[str, Any] = {}
        if self.is_main:
            try:
                outcome = {"value": compute()}
            except UserError as error:
                outcome = {"error": str(error)}
        outcome = json.loads(self.all_gather_text(json.dumps(outcome), name)[0])
        if "error" in outcome:
            raise UserError(outcome["error"])
        return outcome["value"]

    def barrier(self, name: str) -> None:
        """Wait for all ranks. Collective: every rank must call it."""
        if self.world_size > 1:
            with collective_op(name):
                dist.barrier()

    def synchronize(self) -> None:
        """Wait for queued device work, so that clocks read true."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
            gc.collect()  # of what still refers to the group: its threads, left alone, can abort the exit

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def describe(self) -> str:
        """One line for the head of a run's output."""
        where = f"{self.device.type} ({device_name(self.device)})"
        if self.device.type == "cpu":
            where += f", {torch.get_num_threads()} threads"
        many = f", {self.world_size} processes" if self.world_size > 1 else ""
        return f"{where}{many}, {str(self.dtype).removeprefix('torch.')} ({self.dtype_reason})"


def pick_device_type(wanted: str) -> str:
    """`wanted` if this machine has it, else the best there is: cuda, mps, cpu."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not wanted:
        return next(name for name, there in available.items() if there)
    if wanted not in available:
        raise UserError(f"--device-type must be one of {', '.join(available)} (or empty for the best), got {wanted!r}")
    if not available[wanted]:
        there = ", ".join(name for name, yes in available.items() if yes)
        raise UserError(f"--device-type={wanted}: this machine has none that PyTorch can use; available: {there}")
    return wanted


def pick_dtype(device_type: str, wanted: str = "") -> tuple[torch.dtype, str]:
    """bfloat16 where the hardware multiplies it fast, float16 on GPUs fast in that alone, else float32; with the
    reason in words."""
    if wanted:
        if wanted not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {wanted!r} (NANOCHAT_DTYPE?)")
        return DTYPES[wanted], "as asked"
    if device_type == "cuda":
        capability = torch.cuda.get_device_capability()
        if capability >= (8, 0):
            return torch.bfloat16, "CUDA SM80 or newer"
        if capability >= (7, 0):  # Volta and Turing, the first with tensor cores
            return torch.float16, "this GPU has no bfloat16; the loss is scaled"
        return torch.float32, "this GPU has no tensor cores"
    if device_type == "cpu":
        feature = fast_bf16_cpu_feature(cpu_flags())
        return (torch.bfloat16, f"CPU has {feature}") if feature else (torch.float32, "CPU has no AMX or AVX512-BF16")
    # PyTorch has bfloat16 there from macOS 14 on only; NANOCHAT_DTYPE=bfloat16 asks for it.
    return torch.float32, "works on every Apple GPU"


def fast_bf16_cpu_feature(flags: set[str]) -> str | None:
    """The instruction set that makes bfloat16 products faster than float32 ones, if the CPU has one."""
    for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")):
        if flag in flags:
            return name
    return None


def cpu_flags(path: str = "/proc/cpuinfo") -> set[str]:
    """Feature flags of the first CPU; empty where the system does not list them."""
    try:
        with open(path) as file:
            return next((set(line.split(":", 1)[1].split()) for line in file if line.startswith("flags")), set())
    except OSError:
        return set()


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed for the next allocation; elsewhere nothing happens.

    By default it hands every block above 32 MiB back to the system, and a training step asks for the same ones
    again and again: each time the kernel maps and clears all their pages, up to a fifth of a step (dev/LOG.md).
    """
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # from malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, 2**30)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**26)


def end_with_launcher() -> None:
    """Under torchrun on Linux, have SIGTERM sent to this process when the launcher dies.

    Otherwise the processes of a launcher that was killed train on unseen, and keep the run's folder from whoever
    wants to go on with it.
    """
    PR_SET_PDEATHSIG = 1  # from prctl.h
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def process_age() -> float:
    """Seconds since this process was started, or, where the system does not say, since this file was imported."""
    try:
        # After the name, which is in brackets and may hold anything, fields 3, 4, ...; 22 is the start, in ticks.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return uptime - int(fields[22 - 3]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.perf_counter() - IMPORTED


def seed_everything(seed: int) -> None:
    """Seed the global generators. Code that samples should still take an explicit generator."""
    random.seed(seed)
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of the global torch generators, as uint8 tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore what rng_state returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
