"""From --depth to every number of a run: sizes, horizon, batch size, learning rates, weight decay.

Sources: the compute-optimal ratio and the reference learning rates are those published with the February 2026
system; batch size grows with the horizon as in arXiv 2505.13738, learning rates with the square root of the batch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nanochat.common import UserError, format_count
from nanochat.common.ranges import Range
from nanochat.gpt import GPT, GPTConfig

REFERENCE_BATCH_TOKENS = 2**19  # the batch size at which the reference learning rates were tuned
REFERENCE_DEPTH = 12
REFERENCE_RATIO = 10.5  # tokens per scaling parameter of those runs
MAX_DEPTH = 128
# The largest network that recipes were compared on here (dev/LOG.md; at depth 6 1.797 bits per byte after 200 steps of
# 4,096 tokens, where the later recipe had 1.971), and the largest budget of planning/law.json. What is measured
# there does not travel far.
MEASURED_SIZE = 12 * 6 * 384**2  # see network_size
MEASURED_FLOPS = 1e14
USUAL_SHARE_OF_PEAK = 0.4  # of the measured peak of matrix products; an estimate until training has been timed


@dataclass
class Sizes:
    """Fields of GPTConfig that depth implies."""

    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int


def derive_sizes(
    depth: int, aspect_ratio: int = 64, head_dim: int = 128, n_embd: int = -1, n_head: int = -1, n_kv_head: int = -1
) -> Sizes:
    """Width = depth * aspect_ratio, rounded up to a multiple of head_dim; explicit sizes override (-1 = derive)."""
    given, derivable = Range(1), Range(1, unset=-1)
    for name, value, allowed in (
        ("--depth", depth, Range(1, MAX_DEPTH)),
        ("--aspect-ratio", aspect_ratio, given),
        ("--head-dim", head_dim, given),
        ("--n-embd", n_embd, derivable),
        ("--n-head", n_head, derivable),
        ("--n-kv-head", n_kv_head, derivable),
    ):
        if value not in allowed:
            raise UserError(f"{name} must be {allowed}, got {value}")
    if n_embd == -1:
        n_embd = n_head * head_dim if n_head > 0 else math.ceil(depth * aspect_ratio / head_dim) * head_dim
    if n_head == -1:
        if n_embd % head_dim:
            raise UserError(
                f"--n-embd={n_embd} is not a multiple of --head-dim={head_dim}; change one or give --n-head"
            )
        n_head = n_embd // head_dim
    return Sizes(depth, n_embd, n_head, n_head if n_kv_head == -1 else n_kv_head)


def network_size(n_layer: int, n_embd: int) -> int:
    """Parameters in the blocks' matrices, as if every head had its own keys and values: a size that the vocabulary does
    not change."""
    return 12 * n_layer * n_embd**2


def estimate(config: GPTConfig) -> tuple[int, dict[str, int]]:
    """(training FLOPs per token, parameter counts by kind), from a model on the meta device."""
    with torch.device("meta"):
        model = GPT(config)
    return model.estimate_flops(), model.num_scaling_params()


def scaling_params(counts: dict[str, int]) -> int:
    """The parameter count used in scaling laws: transformer matrices and head."""
    return counts["transformer_matrices"] + counts["lm_head"]


@dataclass
class Plan:
    """The derived numbers of a pretraining run. `tokens` = num_steps * total_batch_tokens."""

    num_steps: int
    total_batch_tokens: int
    flops_per_token: int
    params: dict[str, int]
    lr_scale: float
    weight_decay: float
    horizon: str  # the flag that fixed num_steps
    decay_bounded: bool = False  # by bounded_weight_decay
    recipe: str = ""  # resolved

    @property
    def tokens(self) -> int:
        return self.num_steps * self.total_batch_tokens

    @property
    def tokens_per_param(self) -> float:
        return self.tokens / scaling_params(self.params)


def optimal_batch_tokens(tokens: float, reference_tokens: float) -> int:
    """2^19 * (tokens / tokens at the reference depth)^0.383, to the nearest power of two."""
    exact = REFERENCE_BATCH_TOKENS * (tokens / reference_tokens) ** 0.383
    return 2 ** round(math.log2(max(exact, 1)))


def align_batch(total_batch_tokens: int, sequence_len: int) -> int:
    """The multiple of sequence_len nearest to total_batch_tokens; at least one row."""
    return max(1, round(total_batch_tokens / sequence_len)) * sequence_len


def scaled_weight_decay(weight_decay: float, depth: int) -> float:
    """weight_decay * (12 / depth)^2, as published: deeper models train longer and need less."""
    return weight_decay * (REFERENCE_DEPTH / depth) ** 2


def horizon_weight_decay(weight_decay: float, batch: float, tokens: float, reference_tokens: float) -> float:
    """weight_decay * sqrt(batch / 2^19) * reference_tokens / tokens: the averaging time of the weights is a constant
    share of the run (arXiv 2405.13698)."""
    return weight_decay * batch_lr_scale(batch) * reference_tokens / tokens


def bounded_weight_decay(weight_decay: float, lr: float, max_shrink: float) -> float:
    """The decay, limited so that one step at rate `lr` shrinks a weight by at most the fraction `max_shrink`.

    c_fc shrinks twice as fast, as Muon doubles its rate for its shape. Runs of few steps need the limit: beyond a
    fraction of 1 per step, decay would make weights grow.
    """
    return min(weight_decay, max_shrink / lr) if lr > 0 else weight_decay


def batch_lr_scale(batch_tokens: float, exponent: float = 0.5) -> float:
    """Factor on the reference learning rates: (batch_tokens / 2^19)^exponent."""
    return (batch_tokens / REFERENCE_BATCH_TOKENS) ** exponent


def horizon_lr_scale(tokens: float, reference_tokens: float, exponent: float) -> float:
    """Factor on the learning rates: (reference_tokens / tokens)^exponent, as shorter runs need higher rates
    (arXiv 2409.19913). At least 1: runs longer than the reference keep its rates."""
    return max(1.0, reference_tokens / tokens) ** exponent


def reference_params(config: GPTConfig) -> int:
    """Scaling parameters of the reference depth at this vocabulary and context."""
    reference = GPTConfig(config.sequence_len, config.vocab_size, **vars(derive_sizes(REFERENCE_DEPTH)))
    return scaling_params(estimate(reference)[1])


def make_plan(
    config: GPTConfig,
    *,
    num_iterations: int = -1,
    target_flops: float = -1.0,
    target_param_data_ratio: float = 10.5,
    total_batch_size: int = -1,
    weight_decay: float = 0.2,
    matrix_lr: float = 0.02,
    decay_by_horizon: bool = False,
    most_decay: float = 0.1,
    batch_exponent: float = 0.5,
    horizon_exponent: float = 0.0,
    lr_scale: float = 1.0,
    recipe: str = "",
) -> Plan:
    """Resolve the horizon (--num-iterations, then --target-flops, then --target-param-data-ratio) and the batch.

    -1 derives a value. The arguments from `decay_by_horizon` on, weight_decay and matrix_lr come from the recipe
    (recipe.recipe_rules).
    """
    for name, value in (("--num-iterations", num_iterations), ("--total-batch-size", total_batch_size)):
        if value not in Range(1, unset=-1):
            raise UserError(f"{name} must be {Range(1, unset=-1)}, got {value}")
    flops_per_token, params = estimate(config)
    reference = reference_params(config)
    tokens_per_param = target_param_data_ratio if target_param_data_ratio > 0 else REFERENCE_RATIO
    reference_tokens = tokens_per_param * reference
    tokens = target_flops / flops_per_token if target_flops > 0 else tokens_per_param * scaling_params(params)
    if total_batch_size == -1:
        total_batch_size = optimal_batch_tokens(tokens, reference_tokens)
    batch = align_batch(total_batch_size, config.sequence_len)
    steps = max(1, round(tokens / batch))
    if num_iterations > 0:
        steps, horizon = num_iterations, "--num-iterations"
    elif target_flops > 0:
        horizon = "--target-flops"
    elif target_param_data_ratio > 0:
        horizon = "--target-param-data-ratio"
    else:
        raise UserError("no horizon: give --num-iterations, --target-flops, --target-param-data-ratio or --minutes")
    lr_scale *= batch_lr_scale(batch, batch_exponent)
    lr_scale *= horizon_lr_scale(steps * batch, REFERENCE_RATIO * reference, horizon_exponent)
    decay = unbounded = scaled_weight_decay(weight_decay, config.n_layer)
    if decay_by_horizon:
        unbounded = horizon_weight_decay(weight_decay, batch, steps * batch, reference_tokens)
        decay = bounded_weight_decay(unbounded, matrix_lr * lr_scale, most_decay)
    return Plan(steps, batch, flops_per_token, params, lr_scale, decay, horizon, decay < unbounded, recipe)


def beyond_measured(config: GPTConfig, plan: Plan) -> tuple[float, float]:
    """(size of the network, training FLOPs) of a run, as multiples of the largest that were measured here."""
    size = network_size(config.n_layer, config.n_embd) / MEASURED_SIZE
    return size, plan.tokens * plan.flops_per_token / MEASURED_FLOPS


def ngram_share(counts: Mapping[str, int]) -> str:
    """`, 8.39M of them in the table of n-grams`, to follow a number of parameters; "" without such a table."""
    in_table = counts.get("ngram_embed", 0)
    return f", {format_count(in_table)} of them in the table of n-grams" if in_table else ""


def reported_params(counts: Mapping[str, int]) -> dict[str, int]:
    """A report's values: `num_params`, and `ngram_params` where there are any."""
    in_table = {"ngram_params": counts["ngram_embed"]} if "ngram_embed" in counts else {}
    return {"num_params": counts["total"], **in_table}


def describe(config: GPTConfig, plan: Plan) -> list[tuple[str, str]]:
    """The plan as (name, value) rows, printed before training and kept in the report."""
    counts = plan.params
    inside = {"matrices and head": scaling_params(counts), "the table of n-grams": counts.get("ngram_embed", 0)}
    shares = [f"{format_count(number)} in {where}" for where, number in inside.items() if number]
    size, flops = beyond_measured(config, plan)
    excess = {"largest network": size, "FLOPs of the longest run": flops}
    outside = "no: " + ", ".join(f"{x:,.1f} x the {what}" for what, x in excess.items() if x > 1) + " compared here"
    rows: list[tuple[str, Any]] = [
        ("layers x width", f"{config.n_layer} x {config.n_embd}"),
        ("heads (key/value), head size", f"{config.n_head} ({config.n_kv_head}), {config.head_dim}"),
        ("context, windows", f"{config.sequence_len}, {config.window_pattern} (short {config.short_window})"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("parameters", f"{counts['total']:,} ({', '.join(shares)})"),
        ("training FLOPs per token", f"{plan.flops_per_token:,}"),
        ("tokens per step", f"{plan.total_batch_tokens:,}"),
        ("steps", f"{plan.num_steps:,} (from {plan.horizon})"),
        ("tokens", f"{plan.tokens:,} ({plan.tokens_per_param:.2f} per parameter)"),
        ("training FLOPs", f"{plan.tokens * plan.flops_per_token:.3e}"),
        ("recipe", plan.recipe),
        ("measured here", "yes" if max(size, flops) <= 1 else outside),
        ("learning rate scale", f"{plan.lr_scale:.4f}"),
        ("matrix weight decay", f"{plan.weight_decay:.4g}{' (bounded: short run)' if plan.decay_bounded else ''}"),
    ]
    return [(name, str(value)) for name, value in rows]
