"""How fast this machine trains a model of a given size, and which depth suits a given time.

Both are measured by training for a few seconds before the run.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.planning.hardware import Gpu, Pace, known_gpu
from nanochat.planning.law import LAW_FILE, Candidate, Choice, Law
from nanochat.planning.memory import memory_by_kind
from nanochat.reporting.machine import memory_bytes
from nanochat.runtime import Runtime, device_name
from nanochat.scaling import REFERENCE_DEPTH, USUAL_SHARE_OF_PEAK, align_batch, estimate
from nanochat.train.build import choose_device_batch, create_step, random_batch
from nanochat.train.busy_cores import CoreWatch
from nanochat.train.config import TrainConfig
from nanochat.train.schedules import ScheduleConfig
from nanochat.train.timing import batch_for_minutes, reference_peak, steps_in, time_calls

MEASURING_SECONDS = 20.0  # for each model, as a rule
MEASURING_SHARE = 0.01  # of --minutes, for each of PROBES, where that is less
SHORTEST_ROW = 256  # tokens: fewer would not keep the matrix products busy
SHALLOWEST = 2  # one layer learns no induction (arXiv 2209.11895): it cannot copy what stands in a question
PROBES = (2, 6)  # depths that are timed; the pace of others is interpolated linearly


def choose_depth(
    minutes: float,
    total_batch_size: int,
    config_of_depth: Callable[[int], GPTConfig],
    gpu: Gpu,
    runtime: Runtime,
    ranks: int | None = None,
) -> Choice:
    """The depth with the lowest loss after `minutes` on this machine, by the fitted law; the same on all ranks.

    `total_batch_size` is in tokens, -1 for the default of --minutes; `gpu` is this_machine(). A step is shared by
    `ranks`, by default those of `runtime`. Raises UserError if there is no law.
    """
    law = Law.load()
    if law is None:
        raise UserError(
            f"--depth=-1 needs a fitted scaling law in {LAW_FILE} (docs/scaling.md says how to fit one); give a depth"
        )
    total = batch_for_minutes(runtime.device.type) if total_batch_size == -1 else total_batch_size
    total = align_batch(total, config_of_depth(2).sequence_len)
    choice = best_depth(minutes, total, config_of_depth, law, gpu, runtime, ranks or runtime.world_size)
    return choice._replace(key=int(runtime.all_reduce_max(choice.key, "choosing the depth")))


def best_depth(
    minutes: float,
    batch_tokens: int,
    config_of_depth: Callable[[int], GPTConfig],
    law: Law,
    gpu: Gpu,
    runtime: Runtime,
    ranks: int = 1,
) -> Choice:
    """The depth, from 2 to 12, with the lowest loss after `minutes` on this machine.

    `batch_tokens` are per step, shared by `ranks` in whole rows.
    """
    cores, T = CoreWatch(), config_of_depth(SHALLOWEST).sequence_len
    own_tokens = math.ceil(batch_tokens / T / ranks) * T
    candidates = {depth: Candidate.of(config_of_depth(depth)) for depth in range(SHALLOWEST, REFERENCE_DEPTH + 1)}
    seconds = min(MEASURING_SECONDS, MEASURING_SHARE * 60 * minutes)
    pace0, pace1 = (measure_pace(config_of_depth(depth), gpu, runtime, seconds) for depth in PROBES)
    probe0, probe1 = (candidates[depth] for depth in PROBES)
    if runtime.device.type == "cpu" and (text := cores.warning("the measurement from which the depth is chosen")):
        runtime.warn0(text)

    def interpolate(x: float, x0: float, x1: float, y0: float, y1: float) -> float:
        return y0 + (x - x0) / (x1 - x0) * (y1 - y0)

    def flops(depth: int) -> float:
        model = candidates[depth]
        token = interpolate(
            model.flops_per_token,
            probe0.flops_per_token,
            probe1.flops_per_token,
            pace0.token_seconds,
            pace1.token_seconds,
        )
        update = interpolate(model.params, probe0.params, probe1.params, pace0.update_seconds, pace1.update_seconds)
        steps = steps_in(minutes, Pace(token, update, "").step_seconds(own_tokens))
        return steps * batch_tokens * model.flops_per_token

    return law.best(flops, candidates)


def this_machine(runtime: Runtime) -> Gpu:
    """This machine's device, with its peak from reference_peak. The same on all ranks."""
    name, known = device_name(runtime.device), known_gpu(runtime)
    if runtime.device.type == "cuda":
        memory = float(torch.cuda.mem_get_info(runtime.device)[0])
    else:
        name, memory = f"{name}, {os.cpu_count()} CPUs", available_memory()
    # Other work on the machine only lowers the peak; ranks must use the same one, as they go on to measure together.
    peak = runtime.all_reduce_max(max(reference_peak(runtime)[0] for _ in range(3)), "measuring the peak")
    memory = -runtime.all_reduce_max(-memory, "measuring the memory")
    dollars, dtype = known.dollars_per_hour if known else None, str(runtime.dtype).removeprefix("torch.")
    return Gpu(name, memory, peak, None, 0.0, dollars, dtype, runtime.device.type)


def available_memory(path: str = "/proc/meminfo") -> float:
    """Bytes of memory that this process can still allocate; all it may use where the system does not say."""
    most = float(memory_bytes())
    try:
        lines = Path(path).read_text().splitlines()
        return min([most, *(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))])
    except OSError:
        return most


def measure_pace(config: GPTConfig, gpu: Gpu, runtime: Runtime, within: float | None = None) -> Pace:
    """Time a micro-batch and an update of the model, or of a shorter or shallower one where that would take longer
    than `within` seconds (None: MEASURING_SECONDS)."""
    within = MEASURING_SECONDS if within is None else within
    cost, params = estimate(config)
    usual = USUAL_SHARE_OF_PEAK * gpu.peak_flops
    for trial, rows in trials(config, choose_device_batch(-1, 2**30, config.sequence_len, runtime)):
        trial_cost, trial_params = estimate(trial)
        tokens = rows * trial.sequence_len
        seconds = 3 * (tokens * trial_cost + update_flops(trial)) / usual  # one to warm up, at least two to measure
        memory = sum(memory_by_kind(trial, gpu, 1, rows).values())
        if seconds > within or memory > gpu.memory_bytes / 2:
            continue
        micro, update = time_step(trial, rows, runtime, within / 16)
        layers = "all" if trial.n_layer == config.n_layer else f"{trial.n_layer} of the"
        return Pace(
            micro / tokens * cost / trial_cost,
            update * updated(params) / updated(trial_params),
            f"measured on this machine with {layers} layers: {micro:.3g} s for {rows} x {trial.sequence_len} "
            f"tokens and {update:.3g} s for an update, scaled by FLOPs and parameters",
        )
    return Pace(
        cost / usual,
        0.0,
        f"{USUAL_SHARE_OF_PEAK:.0%} of the peak of matrix products, "
        "as even one layer takes too long to be measured here",
    )


def updated(params: dict[str, int]) -> int:
    """Parameters whose update takes longer in a deeper model: the table of n-grams has one size at any depth."""
    return params["total"] - params.get("ngram_embed", 0)


def trials(config: GPTConfig, rows: int) -> Iterator[tuple[GPTConfig, int]]:
    """(model, rows) to measure: the real sizes first, then ever cheaper ones, with fewer rows, tokens, layers."""
    yield config, rows
    yield config, 1
    while config.sequence_len > SHORTEST_ROW:
        config = replace(config, sequence_len=max(SHORTEST_ROW, config.sequence_len // 2))
        yield config, 1
    while config.n_layer > 1:
        config = replace(config, n_layer=config.n_layer // 2)
        yield config, 1


def update_flops(config: GPTConfig) -> float:
    """FLOPs of one Muon update: per matrix and iteration, two products with the Gram matrix of its smaller side, and
    one of that with itself. AdamW's are negligible."""
    with torch.device("meta"):
        shapes = [sorted(p.shape) for p in GPT(config).blocks.parameters() if p.dim() == 2]
    return sum(5 * (4 * small**2 * large + 2 * small**3) for small, large in shapes)


def time_step(config: GPTConfig, rows: int, runtime: Runtime, seconds: float) -> tuple[float, float]:
    """(seconds of a micro-batch of `rows` rows on each rank, seconds of an update), each the fastest of two, or of up
    to 5 within `seconds`."""
    total = rows * runtime.world_size
    step = create_step(
        GPT.create(config, runtime.device, runtime.dtype),
        TrainConfig(device_batch_size=rows),
        "default",
        ScheduleConfig(1000),
        runtime,
        rows=total,
        T=config.sequence_len,
        lr_scale=1.0,
        weight_decay=0.0,
        compile="auto",
    )
    batch = random_batch(total, config.sequence_len, config.vocab_size, runtime)
    micro = time_calls(lambda: step.accumulate(batch), runtime, seconds, most=5)
    update = time_calls(step.optimizer.step, runtime, seconds, most=5)
    return min(micro), min(update)
