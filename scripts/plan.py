"""What a pretraining run will take, before it starts: `python -m scripts.plan --depth=24 --gpu=h100 --num-gpus=8`.

Steps, FLOPs, memory, time and cost, with the assumptions behind them. `--gpu=here` (the default) measures this
machine by training for a few steps.
"""

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch

from nanochat.common import UserError, say
from nanochat.gpt import GPTConfig
from nanochat.planning.law import Law
from nanochat.planning.planner import Pace, RunPlan, expected_pace, find_gpu, plan_run
from nanochat.ranges import Range
from nanochat.recipe import recipe_rules
from nanochat.runtime import Runtime
from nanochat.scaling import Plan, align_batch, make_plan
from nanochat.tokenizer import get_tokenizer
from nanochat.train.session import choose_device_batch
from scripts import _cli
from scripts._model import ModelFlags, network
from scripts._pace import choose_depth, measure_pace, this_machine
from scripts._train import batch_for_minutes, print_table, steps_in

USUAL_VOCAB_SIZE = 32768


@dataclass
class Config(ModelFlags):
    """Plan a pretraining run: steps, memory, time and cost. The model's and the horizon's flags are base_train's."""

    gpu: str = "here"
    """h100, a100, 4090, … (an unknown one lists them all); here measures this machine."""
    num_gpus: Annotated[int, Range(1, unset=-1)] = -1
    """GPUs that share each step; -1 is one, or with --gpu=here all there are."""
    fp8: bool = False
    """Matrix products in fp8."""
    minutes: Annotated[float, Range(above=0, unset=-1)] = -1.0
    """Plan for as many steps as fit in this time."""
    dollars_per_gpu_hour: Annotated[float, Range(0, unset=-1)] = -1.0
    """Price; -1 takes the GPU's usual one."""
    json: bool = False
    """Print one line of JSON instead of the table."""
    vocab_size: int = -1
    """Tokens in the vocabulary; -1 is 32768, or with --gpu=here what the trained tokenizer has."""
    num_iterations: int = -1
    """Horizon in optimizer steps."""
    total_batch_size: int = -1
    """Tokens per optimizer step over all GPUs; -1 derives it."""
    device_batch_size: int = -1
    """Rows per micro-batch and GPU; -1 finds the largest that fits."""


def main(argv: Sequence[str] | None = None) -> None:
    """Plan, print."""
    config = _cli.parse(Config, argv)
    if config.vocab_size == -1:
        config = replace(config, vocab_size=usual_vocab_size(config.gpu.lower() == "here"))
    by_time = config.depth == -1 and config.minutes > 0 and config.gpu.lower() == "here"
    model_config = network(config, config.vocab_size)(2 if by_time else config.depth)
    make_plan(model_config, **horizon(config, num_steps=1))  # a mistake is refused before anything is measured
    made = plan_here(config, model_config) if config.gpu.lower() == "here" else plan_there(config, model_config)
    if config.minutes > 0 and config.num_iterations == -1:
        made.wall_seconds = 60 * config.minutes
        made.assumptions.append(
            "time: --minutes counts from the program's start to its end, evaluations and report "
            "included; the number of steps follows the clock"
        )
    if config.json:
        say(json.dumps(made.to_dict()))
        return
    print_table("plan", made.rows())
    say("It assumes:")
    for sentence in made.assumptions:
        say(f"- {sentence}")


def usual_vocab_size(here: bool) -> int:
    """Of the tokenizer that base_train would take, if there is one and it is for this machine."""
    if here:
        with contextlib.suppress(UserError):  # none trained yet
            return get_tokenizer().get_vocab_size()
    return USUAL_VOCAB_SIZE


def horizon(config: Config, num_steps: int = -1) -> dict[str, Any]:
    """make_plan's arguments; with --minutes it is `num_steps` that counts."""
    by_time = config.minutes > 0 and config.num_iterations == -1
    return {
        "num_iterations": num_steps if by_time else config.num_iterations,
        "target_flops": config.target_flops,
        "target_param_data_ratio": config.target_param_data_ratio,
        "total_batch_size": config.total_batch_size,
        **recipe_rules(config.recipe),
    }


def fix_steps(config: Config, model_config: GPTConfig, pace: Pace, num_gpus: int, cpu: bool) -> Plan:
    """The plan of the horizon asked for; with --minutes the steps that fit, at base_train's batch."""
    if config.minutes <= 0 or config.num_iterations > 0:
        return make_plan(model_config, **horizon(config))
    if config.total_batch_size == -1:
        config = replace(config, total_batch_size=batch_for_minutes("cpu" if cpu else "cuda"))
    T = model_config.sequence_len
    rows = align_batch(config.total_batch_size, T) // T
    steps = steps_in(config.minutes, pace.step_seconds(math.ceil(rows / num_gpus) * T))
    plan = make_plan(model_config, **horizon(config, steps))
    plan.horizon = f"--minutes={config.minutes:g}"
    return plan


def plan_there(config: Config, model_config: GPTConfig) -> RunPlan:
    """On a GPU known by name: by the published runs' rule."""
    gpu = find_gpu(config.gpu)
    pace = expected_pace(model_config, gpu, config.fp8)
    num_gpus = max(1, config.num_gpus)
    plan = fix_steps(config, model_config, pace, num_gpus, cpu=False)
    return plan_run(
        model_config,
        plan,
        gpu,
        pace,
        num_gpus=num_gpus,
        device_batch_size=config.device_batch_size,
        dollars_per_gpu_hour=config.dollars_per_gpu_hour,
        fp8=config.fp8,
        law=Law.load(),
    )


# ---------------------------------------------------------------------------------------------------
# This machine


def plan_here(config: Config, model_config: GPTConfig) -> RunPlan:
    """On this machine: by training for a moment."""
    if config.fp8:
        raise UserError("--fp8 cannot be measured with --gpu=here: name the GPU, such as --gpu=h100")
    with Runtime.create() as runtime:
        cpu = runtime.device.type != "cuda"
        there = 1 if cpu else torch.cuda.device_count()
        num_gpus = there if config.num_gpus == -1 else config.num_gpus
        if num_gpus > there:
            raise UserError(f"--num-gpus={num_gpus}: this machine has {there}; name another with --gpu")
        if not config.json:
            say(f"measuring this machine: {runtime.describe()}")
        gpu = this_machine(runtime)
        if config.depth == -1:
            of_depth = network(config, config.vocab_size)
            choice = choose_depth(config.minutes, config.total_batch_size, of_depth, runtime)
            config, model_config = replace(config, depth=choice.key), of_depth(choice.key)
        pace = measure_pace(model_config, gpu, runtime)
        plan = fix_steps(config, model_config, pace, num_gpus, cpu)
        # On a CPU small micro-batches, which stay in its caches, are the fast ones.
        most = choose_device_batch(-1, 2**30, model_config.sequence_len, runtime) if cpu else None
        return plan_run(
            model_config,
            plan,
            gpu,
            pace,
            num_gpus=num_gpus,
            most_rows=most,
            device_batch_size=config.device_batch_size,
            device_type=runtime.device.type,
            dollars_per_gpu_hour=config.dollars_per_gpu_hour,
            law=Law.load(),
        )


if __name__ == "__main__":
    _cli.run(main)
