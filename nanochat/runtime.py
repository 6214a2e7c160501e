"""The Runtime of a run: device, dtype, rank and world size, seed. Created once in main(), closed once.

Everything that depends on the machine is decided here and passed down as a value, so that no other module reads the
environment or keeps a global dtype. Training code calls collectives as methods of Runtime; what happens when a
rank fails is described in nanochat/distributed/__init__.py.
"""

import ctypes
import gc
import os
import platform
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nanochat.common import UserError, say, warn
from nanochat.device.cpu import cpuinfo, keep_freed_memory
from nanochat.device.cuda import open_card, why_none
from nanochat.device.dtype import pick_dtype
from nanochat.distributed.collectives import all_gather_json, collective_op, init_process_group

IMPORTED = time.perf_counter()
TIMEOUT_SECONDS = 1800.0  # of collectives: the longest that ranks wait for one that is busy (evaluating) or gone
MAX_LOADER_THREADS = 8  # with more, packing is what limits (bench.data), which one thread does


@dataclass
class Runtime:
    """This rank's view of the run. `local_rank` counts the ranks on this host."""

    device: torch.device
    dtype: torch.dtype  # of activations and matrix products; weights and optimizer state stay fp32
    dtype_reason: str
    seed: int
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    timeout_seconds: float = TIMEOUT_SECONDS  # of collectives
    failed: bool = False  # on this rank; the others may be waiting for it
    deterministic: bool = False  # as requested; see make_deterministic

    @classmethod
    def create(
        cls,
        device_type: str = "",
        dtype: str = "",
        seed: int = 42,
        timeout_seconds: float = TIMEOUT_SECONDS,
        deterministic: bool = False,
    ) -> "Runtime":
        """Choose device and dtype (empty: the best available), seed, and join the process group under torchrun.

        Collective: every rank must call it. Raises UserError for a device that is not there or cannot be used, and for
        an unknown dtype.
        """
        stop_with_launcher()
        rank, local_rank, world_size = (
            int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))
        )
        requested, device_type = device_type, pick_device_type(device_type)
        if device_type == "cpu" and not requested and rank == 0 and (reason := why_no_gpu()):
            warn(f"using the CPU: {reason} (--device-type=cpu silences this)")
        if device_type == "mps" and world_size > 1:
            raise UserError("Apple GPUs support one rank only: run without torchrun, or use --device-type=cpu")
        device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device(device_type)
        if device_type == "cuda":
            use_expandable_segments()
            start_cuda(device, deterministic)
        elif device_type == "cpu":
            keep_freed_memory()
        chosen, reason = pick_dtype(device_type, dtype or os.environ.get("NANOCHAT_DTYPE", ""))
        if world_size > 1 and not dist.is_initialized():
            settings = f"{device_type}/{chosen}".replace("torch.", "")
            init_process_group(device, rank, world_size, timeout_seconds, settings)
        random.seed(seed)
        torch.manual_seed(seed)
        return cls(
            device, chosen, reason, seed, rank, local_rank, world_size, timeout_seconds, deterministic=deterministic
        )

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
        """Warn on rank 0 only. For a warning that all ranks would print."""
        if self.is_main:
            warn(message)

    def error0(self, text: str) -> None:
        """Print on rank 0's standard error only. For an error that all ranks would print."""
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

    def all_gather(self, value: Any, name: str) -> list[Any]:
        """Every rank's value (JSON), by rank. Collective: every rank must call it."""
        return [value] if self.world_size == 1 else all_gather_json(value, name, self.device)

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
        outcome = self.all_gather(outcome, name)[0]
        if "error" in outcome:
            raise UserError(outcome["error"])
        return outcome["value"]

    def barrier(self, name: str) -> None:
        """Wait for all ranks. Collective: every rank must call it."""
        if self.world_size > 1:
            with collective_op(name):
                dist.barrier()

    def make_deterministic(self) -> None:
        """Have every CUDA operation give the same bits each time; one that cannot raises an error that names it.

        Slower. A CPU does so by itself. Raises UserError where it is too late: several GPUs have begun to communicate.
        """
        if self.device.type != "cuda":
            self.print0(f"--deterministic is for CUDA and changes nothing on this device ({self.device.type})")
        elif not self.deterministic and self.world_size > 1:
            raise UserError("the saved run is deterministic: on several GPUs give --deterministic again")
        elif not self.deterministic:
            use_deterministic_cuda()
        self.deterministic = True

    def synchronize(self) -> None:
        """Wait for queued device work, before a clock is read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    @property
    def loader_threads(self) -> int:
        """Threads that tokenise for this rank: its share of the cores but one; one where training itself needs them.

        torchrun's OMP_NUM_THREADS does not count: it is about the threads of one PyTorch operation.
        """
        if self.device.type == "cpu":
            return 1
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        return min(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1), MAX_LOADER_THREADS)

    def close(self) -> None:
        """Leave the process group. After a failure on GPUs the process just ends: NCCL first waits until all of its
        operations have ended, and other ranks may never take part in them."""
        if self.world_size > 1 and dist.is_initialized() and not (self.failed and self.device.type == "cuda"):
            dist.destroy_process_group()
            gc.collect()  # objects that still refer to the group keep its threads alive, which can abort the exit

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, failure: type[BaseException] | None, *exc: object) -> None:
        self.failed |= failure is not None
        self.close()

    def describe(self) -> str:
        """Device, world size and dtype with its reason, in one line."""
        where = f"{self.device.type} ({device_name(self.device)})"
        if self.device.type == "cpu":
            where += f", {torch.get_num_threads()} threads"
        ranks = f", {self.world_size} ranks" if self.world_size > 1 else ""
        return f"{where}{ranks}, {str(self.dtype).removeprefix('torch.')} ({self.dtype_reason})"


def pick_device_type(requested: str) -> str:
    """`requested`, or if empty the first available of cuda, mps, cpu. Raises UserError if it is not available."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a GPU that cannot be used: why_no_gpu says it in one line
        cuda = torch.cuda.is_available()
    available = {"cuda": cuda, "mps": torch.backends.mps.is_available(), "cpu": True}
    usable = [name for name, found in available.items() if found]
    if not requested:
        return usable[0]
    if requested not in available:
        names = ", ".join(available)
        raise UserError(f"--device-type must be one of {names} (or empty for the best), got {requested!r}")
    if requested not in usable:
        reason = why_no_gpu() if requested == "cuda" else ""
        reason = reason or f"PyTorch finds none on this machine; available: {', '.join(usable)}"
        raise UserError(f"--device-type={requested}: {reason}")
    return requested


def why_no_gpu() -> str:
    """Why PyTorch finds no NVIDIA GPU on a machine that seems to have one, and the fix; "" if it has none."""
    return why_none(os.environ.get("CUDA_VISIBLE_DEVICES"))


def start_cuda(device: torch.device, deterministic: bool) -> None:
    """Make `device` this process's GPU, and choose how PyTorch computes on it."""
    if deterministic:
        use_deterministic_cuda()  # before cuBLAS and NCCL read the environment
    open_card(device)
    # float32 is asked for as a reference, so without TF32; some containers switch that on for all programs.
    torch.set_float32_matmul_precision("highest")
    # PyTorch prefers cuDNN's attention on Hopper and Blackwell. It builds a plan of some 20 ms or more for each new
    # number of keys, that is for each generated token. The switch is the process's: set once, it costs no call anything
    # and holds in all threads and compiled graphs.
    torch.backends.cuda.enable_cudnn_sdp(False)


def use_deterministic_cuda() -> None:
    """Make PyTorch use deterministic operations on CUDA, Inductor's choice of kernels included. For the process.

    cuBLAS and NCCL read their part from the environment when they are first used. NCCL's trees and sums in the switch
    (NVLS) do not always add in the same order; rings do (https://github.com/pytorch/pytorch/issues/154880).
    """
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    # By default it also fills new tensors, to find code that reads them unwritten, which costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def device_name(device: torch.device) -> str:
    """The device's product name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpuinfo("model name") or platform.processor() or platform.machine()


def use_expandable_segments() -> None:
    """Let PyTorch's CUDA allocator map memory in pages, which does not fragment as shapes change. Call before CUDA is
    initialised: it reads the variable then. A setting of the user's wins.

    All versions read the older of its names; 2.9 ignores the newer one (pytorch/pytorch#183387). Not on WSL, where the
    first allocation would fail (pytorch/pytorch#192330), nor on Windows, where there are none.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if sys.platform == "linux" and "microsoft" not in platform.release().lower() and not os.environ.keys() & set(names):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def stop_with_launcher() -> None:
    """Under torchrun on Linux, have the kernel send SIGTERM to this process when the launcher dies.

    Otherwise the ranks of a killed launcher would keep training, and hold the lock on the run's folder.
    """
    PR_SET_PDEATHSIG = 1  # from prctl.h
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def process_age() -> float:
    """Seconds since this process started; on systems without /proc since this file was imported."""
    try:
        # Fields 3, 4, ... follow the name, which is in brackets and may hold any character; 22 is the start, in ticks.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return uptime - int(fields[22 - 3]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.perf_counter() - IMPORTED


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on `device`; for CUDA through pinned memory, so that the host does not wait for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
