"""Rows per micro-batch on a GPU: as many as its memory holds, found by trying.

The planner's estimate says where to begin, and the memory that a trial took says which size to try next. Each size that
is tried is compiled anew, which takes far longer than the trial itself: so most searches are one trial.
"""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from nanochat.common import UserError, first_line, is_out_of_memory, say
from nanochat.distributed.collectives import CollectiveFailed
from nanochat.loss_head import gpu_memory
from nanochat.optimizer.update_rules import optimizer_bytes
from nanochat.planning.hardware import Gpu
from nanochat.planning.memory import memory_by_kind
from nanochat.runtime import Runtime, device_name
from nanochat.train.build import random_batch
from nanochat.train.step import TrainStep

# Of the memory that is free for this process. The rest is for what no trial sees: NCCL's buffers and larger CUDA
# contexts, other programs on the card, evaluation and samples, and fragmentation.
USABLE_SHARE = 0.92
OUT_OF_MEMORY, BROKEN = 1e30, math.inf  # stand for the bytes of a trial that failed, the second for another reason


def fit_device_batch(step: TrainStep, requested: int, row_tokens: Callable[[], int], saved: int | None = None) -> None:
    """Lower the step's device batch to what the GPU's memory holds, with a margin, unless a size was requested.

    `row_tokens` computes the tokens of the longest row. `saved` is a resumed run's device batch: without a GPU it
    stays, with one the search begins there if the planner expects it to fit. Collective.
    """
    runtime, most = step.runtime, step.device_batch_size
    if requested > 0:
        return
    if runtime.device.type != "cuda":
        step.device_batch_size = saved or most
        return
    T, first = row_tokens(), min(saved or most, most)
    sizes = sorted({most >> halvings for halvings in range(most.bit_length())} | {first})
    usable = -runtime.all_reduce_max(-usable_bytes(runtime.device), "measuring the memory")
    dtype, config = str(runtime.dtype).removeprefix("torch."), replace(step.model.config, sequence_len=T)
    gpu = Gpu(device_name(runtime.device), gpu_memory(runtime.device) or usable, 0.0, None, 0.0, None, dtype)
    groups = step.optimizer.param_groups
    kinds = {rows: memory_by_kind(config, gpu, runtime.world_size, rows, param_groups=groups) for rows in sizes}
    # The context is not among what PyTorch's allocator takes, and not free any more.
    expected = {rows: float(sum(kinds[rows].values())) - kinds[rows]["context"] for rows in sizes}

    def predict(size: int, rows: int, peak: float) -> float:
        """Bytes of `size` rows, where `rows` took `peak`: what is above the planner's constants is activations."""
        constant = expected[rows] - kinds[rows]["activations"]
        return expected[size] - kinds[size]["activations"] + max(0.0, peak - constant) * size / rows

    first = max((rows for rows in sizes if rows <= first and expected[rows] <= usable), default=1)

    def trial(rows: int) -> float:
        return try_micro_batches(step, rows, T, kinds[rows]["update"])

    with memory_limit(usable, runtime.device):
        rows, peak = find_device_batch(trial, sizes, first, predict, usable, runtime)
    step.device_batch_size = rows
    taken = f"{peak / 2**30:.1f} GiB of memory, {expected[rows] / 2**30:.1f} expected, of {usable / 2**30:.1f} usable"
    runtime.print0(f"{rows} rows of {T} tokens per micro-batch take {taken}")


def find_device_batch(
    trial: Callable[[int], float],
    sizes: Sequence[int],
    first: int,
    predict: Callable[[int, int, float], float],
    usable: float,
    runtime: Runtime,
) -> tuple[int, float]:
    """(the largest of `sizes` whose trial fits in memory on every rank, the bytes it takes). Collective.

    `trial(rows)` returns its peak in bytes or runs out of memory. After one that fits, the largest size is tried that
    should fit too by `predict(size, rows, peak)`. Raises UserError if none fits, and any other error of a trial, as
    CollectiveFailed on the ranks that had none.
    """
    fitting, failing, rows, peak = 0, math.inf, first, 0.0
    while True:
        bytes_taken = try_on_all_ranks(trial, rows, runtime)
        if bytes_taken < OUT_OF_MEMORY:
            fitting, peak = rows, bytes_taken
            larger = [size for size in sizes if rows < size < failing and predict(size, rows, peak) <= usable]
            rows = max(larger, default=0)
        else:
            failing = rows
            rows = max((size for size in sizes if fitting < size < failing), default=0)
        if not rows and not fitting:
            raise UserError("not even one row fits in the GPU's memory: give a smaller --depth or --max-seq-len")
        if not rows:
            return fitting, peak


def try_on_all_ranks(trial: Callable[[int], float], rows: int, runtime: Runtime) -> float:
    """The largest peak of `trial(rows)` over all ranks; OUT_OF_MEMORY if memory is too small on any. Collective."""
    failure: Exception | None = None
    try:
        peak = trial(rows)
    except Exception as error:
        if is_out_of_memory(error):
            peak = OUT_OF_MEMORY
            say(f"{rows} rows per micro-batch do not fit in memory: {first_line(error)}")
        else:
            peak, failure = BROKEN, error
    # Here, as the error's traceback holds the tensors of all frames that it went through.
    if peak == OUT_OF_MEMORY:
        release_memory()
    worst = runtime.all_reduce_max(peak, "checking that the batch fits")
    if failure:
        raise failure
    if worst >= BROKEN:
        raise CollectiveFailed(f"rank {runtime.rank}: another rank failed while it tried {rows} rows")
    return worst


def try_micro_batches(step: TrainStep, rows: int, T: int, update_bytes: int = 0) -> float:
    """Run two random micro-batches, the second with the first one's gradients and optimizer state in memory.

    Returns the bytes that PyTorch's allocator held at the peak. `update_bytes` is what the update needs beyond that.
    Whatever torch.compile compiles here, the run uses.
    """
    runtime = step.runtime
    release_memory()
    torch.cuda.reset_peak_memory_stats(runtime.device)
    step.device_batch_size = rows
    held = torch.empty(missing_state_bytes(step) + update_bytes, dtype=torch.uint8, device=runtime.device)
    batch = random_batch(2 * rows * runtime.world_size, T, step.model.config.vocab_size, runtime)
    try:
        for micro in step.micro_batches(batch):
            step.add_gradients(*micro, num_targets=2 * rows * T)
        runtime.synchronize()  # errors of kernels come late
    finally:
        step.model.zero_grad(set_to_none=True)
    del held  # until here
    return float(torch.cuda.max_memory_reserved(runtime.device))


def missing_state_bytes(step: TrainStep) -> int:
    """Bytes of this rank's optimizer state that its first update will allocate; none of a resumed run's."""
    there = sum(
        value.nbytes
        for state in step.optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    )
    return max(0, optimizer_bytes(step.optimizer.param_groups) // step.runtime.world_size - there)


def release_memory() -> None:
    """Return to the device what nothing refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()


def usable_bytes(device: torch.device) -> float:
    """Bytes of the device that this process may take in all, less a margin."""
    release_memory()
    free, total = torch.cuda.mem_get_info(device)
    own = free + torch.cuda.memory_reserved(device)
    return USABLE_SHARE * min(own, torch.cuda.get_per_process_memory_fraction(device) * total)


@contextmanager
def memory_limit(size: float, device: torch.device) -> Iterator[None]:
    """Let PyTorch's allocator run out of memory at `size` bytes in the block."""
    before = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.mem_get_info(device)[1], device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
