"""Plan a pretraining run before it starts: `python -m scripts.plan --depth=24 --gpu=h100 --num-gpus=8`.

Prints steps, FLOPs, memory, time and cost, with the assumptions behind them. `--gpu=here` (the default) measures this
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
from nanochat.common.ranges import Range
from nanochat.gpt import GPTConfig
from nanochat.planning.hardware import Gpu, Pace, expected_pace, find_gpu
from nanochat.planning.law import Law
from nanochat.planning.planner import RunPlan, plan_run
from nanochat.recipe import get_recipe, recipe_rules, resolve_recipe
from nanochat.reporting.console import print_table
from nanochat.runtime import Runtime
from nanochat.scaling import align_batch, make_plan
from nanochat.tokenizer import get_tokenizer
from nanochat.train.build import usual_rows
from nanochat.train.pace import choose_depth, measure_pace, this_machine
from nanochat.train.pretraining import ModelFlags
from nanochat.train.timing import batch_for_minutes, steps_in
from scripts import _cli

DEFAULT_VOCAB_SIZE = 32768


@dataclass
class Config(ModelFlags):
    """Plan a pretraining run: steps, memory, time and cost. The model's and the horizon's flags are base_train's."""

    gpu: str = "here"
    """h100, a100, 4090, … (an unknown name lists them all); here: measure this machine."""
    num_gpus: Annotated[int, Range(1, unset=-1)] = -1
    """GPUs that share each step; -1: one, or with --gpu=here all."""
    fp8: bool = False
    """Compute matrix products in fp8."""
    minutes: Annotated[float, Range(above=0, unset=-1)] = -1.0
    """Plan for as many steps as fit in this time."""
    dollars_per_gpu_hour: Annotated[float, Range(0, unset=-1)] = -1.0
    """Price; -1: the GPU's usual one."""
    json: bool = False
    """Print one line of JSON instead of the table."""
    vocab_size: int = -1
    """Tokens in the vocabulary; -1: 32768, or with --gpu=here the trained tokenizer's."""
    num_iterations: int = -1
    """Horizon in optimizer steps."""
    total_batch_size: int = -1
    """Tokens per optimizer step over all GPUs; -1: derived."""
    device_batch_size: Annotated[int, Range(1, unset=-1)] = -1
    """Rows per micro-batch and GPU; -1: what training begins with (on a GPU 65,536 tokens), or what fits."""

    @property
    def by_time(self) -> bool:
        """Whether --minutes says how long the run is."""
        return self.minutes > 0 and self.num_iterations == -1


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan."""
    config = _cli.parse(Config, argv)
    here = config.gpu.lower() == "here"
    if config.vocab_size == -1:
        config = replace(config, vocab_size=default_vocab_size(here))
    any_depth = here and config.depth == -1 and config.minutes > 0  # to be chosen once the machine is measured
    if config.depth == -1 and not any_depth:
        raise UserError("--depth=-1 measures this machine: give --minutes and leave out --gpu, or give a depth")
    model_config = config.network(config.vocab_size)(2 if any_depth else config.depth)
    make_plan(model_config, **horizon(config, model_config, num_steps=1))  # refuse wrong flags before measuring
    if here:
        run = plan_here(config, model_config)
    else:  # a GPU known by name, with the speed expected from published runs
        gpu = find_gpu(config.gpu, config.fp8)
        run = plan_with_pace(config, model_config, gpu, expected_pace(model_config, gpu), max(1, config.num_gpus))
    if config.by_time:
        run.wall_seconds = 60 * config.minutes
        run.assumptions.append(
            "time: --minutes is the whole program's time, evaluations and report included; base_train adjusts the "
            "number of steps to the clock"
        )
    if config.json:
        say(json.dumps(run.to_dict()))
        return
    print_table("plan", run.rows())
    say("Assumptions:")
    for sentence in run.assumptions:
        say(f"- {sentence}")


def default_vocab_size(here: bool) -> int:
    """Of the trained tokenizer, if the plan is for this machine and there is one."""
    if here:
        with contextlib.suppress(UserError):  # no tokenizer yet
            return get_tokenizer().get_vocab_size()
    return DEFAULT_VOCAB_SIZE


def horizon(config: Config, model_config: GPTConfig, num_steps: int = -1) -> dict[str, Any]:
    """Arguments of make_plan; `num_steps` is the horizon if --minutes is given."""
    return {
        "num_iterations": num_steps if config.by_time else config.num_iterations,
        "target_flops": config.target_flops,
        "target_param_data_ratio": config.target_param_data_ratio,
        "total_batch_size": config.total_batch_size,
        **recipe_rules(resolve_recipe(config.recipe, model_config.n_layer, model_config.n_embd)),
    }


def plan_here(config: Config, model_config: GPTConfig) -> RunPlan:
    """Plan for this machine, with its speed measured by a few training steps."""
    if config.fp8:
        raise UserError("--fp8 cannot be measured with --gpu=here: name the GPU, such as --gpu=h100")
    with Runtime.create() as runtime:
        available = torch.cuda.device_count() if runtime.device.type == "cuda" else 1
        num_gpus = available if config.num_gpus == -1 else config.num_gpus
        if num_gpus > available:
            raise UserError(f"--num-gpus={num_gpus}: this machine has {available}; name another with --gpu")
        if not config.json:
            say(f"measuring this machine: {runtime.describe()}")
        gpu = this_machine(runtime)
        if config.depth == -1:
            of_depth = config.network(config.vocab_size)
            choice = choose_depth(config.minutes, config.total_batch_size, of_depth, gpu, runtime, num_gpus)
            config, model_config = replace(config, depth=choice.key), of_depth(choice.key)
        pace = measure_pace(model_config, gpu, runtime)
        return plan_with_pace(config, model_config, gpu, pace, num_gpus)


def plan_with_pace(config: Config, model_config: GPTConfig, gpu: Gpu, pace: Pace, num_gpus: int) -> RunPlan:
    """Plan for a machine whose speed is known; with --minutes base_train's batch, and as many steps as fit."""
    if config.dollars_per_gpu_hour >= 0:
        gpu = replace(gpu, dollars_per_hour=config.dollars_per_gpu_hour)
    if config.minutes > 0 and config.total_batch_size == -1:
        config = replace(config, total_batch_size=batch_for_minutes(gpu.device_type))
    steps = -1
    if config.by_time:
        T = model_config.sequence_len
        rows = align_batch(config.total_batch_size, T) // T
        steps = steps_in(config.minutes, pace.step_seconds(math.ceil(rows / num_gpus) * T))
    plan = make_plan(model_config, **horizon(config, model_config, steps))
    if config.by_time:
        plan.horizon = f"--minutes={config.minutes:g}"
    return plan_run(
        model_config,
        plan,
        gpu,
        pace,
        num_gpus=num_gpus,
        max_rows=usual_rows(gpu.device_type, model_config.sequence_len),
        device_batch_size=config.device_batch_size,
        law=Law.load(),
        rates=get_recipe(config.recipe).optimizer(),
    )


if __name__ == "__main__":
    _cli.run(main)
