"""Pretraining: its flags, and the model, plan and training step that follow from them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch

from nanochat import fp8
from nanochat.checkpoint_manager import load_model_state
from nanochat.common import UserError, format_count, get_base_dir
from nanochat.common.ranges import Range
from nanochat.distributed.rank_checks import share_weights
from nanochat.gpt import GPT, GPTConfig
from nanochat.recipe import first_meaning, get_recipe, recipe_rules, resolve_recipe
from nanochat.runtime import Runtime
from nanochat.scaling import Plan, derive_sizes, make_plan
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.build import create_step, random_batch
from nanochat.train.config import DataConfig, OnResume, TrainConfig
from nanochat.train.pace import choose_depth, this_machine
from nanochat.train.run import Run
from nanochat.train.starting_model import read_source
from nanochat.train.step import TrainStep
from nanochat.train.timing import batch_for_minutes, steps_for_minutes

USUAL_CONTEXT = 2048


@dataclass
class ModelFlags:
    """The flags of the network and the horizon, shared with scripts/plan.py."""

    depth: int = 12
    """The one dial: layers. Width, heads, horizon, batch and rates follow. -1 with --minutes: what fits the time."""
    aspect_ratio: int = 64
    """Width per layer."""
    head_dim: int = 128
    """Size of an attention head."""
    n_embd: Annotated[int, Range(1, unset=-1)] = -1
    """Width, overriding depth * aspect ratio."""
    n_head: Annotated[int, Range(1, unset=-1)] = -1
    """Query heads."""
    n_kv_head: Annotated[int, Range(1, unset=-1)] = -1
    """Key/value heads, a divisor of the query heads."""
    max_seq_len: Annotated[int, Range(2, unset=-1)] = -1
    """Context length in tokens; -1 is 2048."""
    window_pattern: str = ""
    """Per layer, tiled: S short window, L full context; the last layer is always L. Empty: the recipe's, SSSL or L."""
    recipe: str = "default"
    """default (small or later, by the network's size), small, published, later, plain or portable; changes may follow:
    default,backout=False,matrix_lr=0.03 (docs/training.md)."""
    target_flops: Annotated[float, Range(above=0, unset=-1)] = -1.0
    """Horizon in training FLOPs."""
    target_param_data_ratio: Annotated[float, Range(above=0, unset=-1)] = 10.5
    """Horizon in tokens per scaling parameter."""

    def network(self, vocab_size: int) -> Callable[[int], GPTConfig]:
        """The model's config as a function of its depth."""
        context = USUAL_CONTEXT if self.max_seq_len == -1 else self.max_seq_len
        given: dict[str, Any] = {"sequence_len": context, "vocab_size": vocab_size}
        if self.window_pattern:
            given["window_pattern"] = self.window_pattern

        def config_of_depth(depth: int) -> GPTConfig:
            sizes = derive_sizes(depth, self.aspect_ratio, self.head_dim, self.n_embd, self.n_head, self.n_kv_head)
            recipe = resolve_recipe(self.recipe, sizes.n_layer, sizes.n_embd)
            config = get_recipe(recipe).model(**given, **asdict(sizes))
            if self.window_pattern not in ("", config.window_pattern):
                raise UserError(
                    f"--recipe={self.recipe} fixes the windows as {config.window_pattern}: give yours as "
                    f"--recipe={self.recipe},window_pattern={self.window_pattern}"
                )
            return config

        return config_of_depth


@dataclass
class PretrainConfig(DataConfig, ModelFlags, TrainConfig):
    """Pretrain a base model from raw text. -1 means "off" or "derive it"."""

    max_seq_len: Annotated[int, Range(2, unset=-1)] = -1
    """Context length in tokens; -1 is 2048, or with --init-from what that model has."""
    warmup_steps: Annotated[int, Range(0, unset=-1)] = -1
    """Linear warm-up, in steps; cut to a third of the run, or to where the rates begin to fall if that is later. -1
    takes the recipe's, here and below."""
    warmup_ratio: Annotated[float, Range(0, 1, unset=-1)] = -1.0
    """Linear warm-up as a share of the run; overrides --warmup-steps."""
    warmdown_ratio: Annotated[float, Range(0, 1, unset=-1)] = -1.0
    """Share of the run over which the rates fall linearly."""
    final_lr_frac: Annotated[float, Range(0, unset=-1)] = -1.0
    """Final rates, as a share of the peak."""
    lr_scale: Annotated[float, Range(0)] = 1.0
    """All rates are multiplied by this: short runs on small batches want more than the square root of the batch."""
    init_from: str = ""
    """Folder of another base run (or its tag) whose weights to start from, with fresh schedules."""
    fp8: bool = False
    """Matrix products of the blocks in fp8; needs a GPU of compute capability 8.9 (Ada, Hopper) and torchao."""
    fp8_recipe: str = "tensorwise"
    """One fp8 scale per tensor (tensorwise, the fastest) or per row (rowwise, more exact)."""
    core_metric_every: Annotated[int, Range(-1), OnResume.NEW] = -1
    """Steps between CORE evaluations; there is one at the end too."""
    core_metric_max_per_task: Annotated[int, Range(1, unset=-1), OnResume.NEW] = 500
    """Items per CORE task; -1 takes all."""
    eval_bundle: Annotated[str, OnResume.NEW] = ""
    """Folder of the CORE bundle; empty: eval_bundle/ in the base folder, downloaded if it is not there."""

    def __post_init__(self) -> None:
        if not self.model_tag and (self.depth == -1 or self.init_from):
            flag = "--init-from" if self.init_from else "--depth=-1"
            raise UserError(f"{flag} needs --model-tag: the run's folder cannot be named after a depth not known yet")

    def start_from(self, tag: str) -> dict[str, Any]:
        sizes = ("depth", "aspect_ratio", "head_dim", "n_embd", "n_head", "n_kv_head", "max_seq_len", "window_pattern")
        return {name: getattr(PretrainConfig, name) for name in sizes} | {"init_from": tag}


def build_model(run: Run[PretrainConfig], tokenizer: RustBPETokenizer) -> GPT:
    """A new model, or one with the weights of --init-from; a resumed run's weights are restored later.

    Fills in the depth and the context that the flags left to derive.
    """
    config, runtime, source = run.config, run.runtime, None
    weights: dict[str, torch.Tensor] = {}
    if config.init_from and not run.checkpoint:
        source, weights = read_source(config.init_from, get_base_dir(), tokenizer, config.max_seq_len, runtime)
    saved = run.checkpoint or source
    model_config = saved.model_config() if saved else new_network(config, tokenizer, runtime)
    config.depth, config.max_seq_len = model_config.n_layer, model_config.sequence_len
    model = GPT.create(model_config, device=runtime.device, compute_dtype=runtime.dtype, seed=config.seed)
    share_weights(runtime, model)
    if source:
        load_model_state(model, weights, source.path)
        runtime.print0(f"weights and network from {source.path}; rates and schedules start anew")
    return model


def new_network(config: PretrainConfig, tokenizer: RustBPETokenizer, runtime: Runtime) -> GPTConfig:
    """The network that the flags describe; --depth=-1 takes the depth that suits --minutes on this machine."""
    config_of_depth = config.network(tokenizer.get_vocab_size())
    if config.depth != -1:
        return config_of_depth(config.depth)
    if config.minutes <= 0:
        raise UserError("--depth=-1 derives the depth from --minutes: give --minutes, or a depth")
    choice = choose_depth(config.minutes, config.total_batch_size, config_of_depth, this_machine(runtime), runtime)
    runtime.print0(
        f"{config.minutes:g} minutes on this machine suit depth {choice.key}: by the fitted law about "
        f"{format_count(choice.tokens)} tokens and {choice.loss:.3f} bits per byte"
    )
    return config_of_depth(choice.key)


def run_recipe(run: Run[PretrainConfig], model_config: GPTConfig) -> str:
    """The run's recipe: of the flags, for a network of this size; a resumed run's is the one it began with."""
    if run.checkpoint:
        return run.checkpoint.meta.get("recipe") or first_meaning(run.config.recipe)
    return resolve_recipe(run.config.recipe, model_config.n_layer, model_config.n_embd)


def plan_arguments(config: PretrainConfig, recipe: str) -> dict[str, Any]:
    """make_plan's arguments, all but the steps; `recipe` is the resolved one."""
    rates, rules = config.optimizer_config(recipe), recipe_rules(recipe)
    return {
        "target_flops": config.target_flops,
        "target_param_data_ratio": config.target_param_data_ratio,
        "total_batch_size": config.total_batch_size,
        **rules,
        "lr_scale": rules["lr_scale"] * config.lr_scale,
        "weight_decay": rates.weight_decay,
        "matrix_lr": rates.matrix_lr,
    }


def fix_plan(run: Run[PretrainConfig], recipe: str, model: GPT) -> Plan:
    """Every number of the run. With --minutes the horizon is estimated by timing real steps."""
    config, runtime = run.config, run.runtime
    arguments = plan_arguments(config, recipe)
    if run.checkpoint:  # the run may go on on another device, whose usual batch is another
        arguments["total_batch_size"] = run.checkpoint.meta["plan"]["total_batch_tokens"]
    elif config.total_batch_size == -1 and config.minutes > 0:
        arguments["total_batch_size"] = batch_for_minutes(runtime.device.type)
    make = partial(make_plan, model.config, **arguments)
    if run.planned_steps is not None:
        return replace(make(num_iterations=run.planned_steps), horizon="the run's first session")
    if not config.ends_on_time:
        return make(num_iterations=config.num_iterations)
    trial = make(num_iterations=1000)
    rows = trial.total_batch_tokens // config.max_seq_len
    batch = random_batch(rows, config.max_seq_len, model.config.vocab_size, runtime)
    num_steps = steps_for_minutes(
        config, partial(build_step, config, recipe, trial, runtime=runtime), model, batch, runtime
    )
    return replace(make(num_iterations=num_steps), horizon=f"--minutes={config.minutes:g}")


def build_step(config: PretrainConfig, recipe: str, plan: Plan, model: GPT, runtime: Runtime) -> TrainStep:
    """The optimizer step of `model`, with the plan's rates and the (resolved) recipe; in fp8 with --fp8."""
    if config.fp8:
        fp8.convert(model, config.fp8_recipe, runtime)
    flags = ("warmup_steps", "warmdown_ratio", "final_lr_frac")
    given = {name: getattr(config, name) for name in flags if getattr(config, name) != -1}
    if config.warmup_ratio >= 0:
        given["warmup_steps"] = round(config.warmup_ratio * plan.num_steps)
    schedule = get_recipe(recipe).schedule(plan.num_steps, **given)
    return create_step(
        model,
        config,
        recipe,
        schedule,
        runtime,
        rows=plan.total_batch_tokens // config.max_seq_len,
        T=config.max_seq_len,
        lr_scale=plan.lr_scale,
        weight_decay=plan.weight_decay,
        compile=config.compile,
    )
