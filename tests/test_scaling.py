"""Sizes from depth, and the plan of a run, against published numbers."""

import pytest

from nanochat.common import UserError
from nanochat.gpt import GPTConfig
from nanochat.scaling import derive_sizes, describe, estimate, make_plan, optimal_batch_tokens, scaling_params
from nanochat.train.pretraining import PretrainConfig, plan_arguments

D24 = GPTConfig(n_layer=24, n_embd=1536, n_head=12, n_kv_head=12)


def plan(config: GPTConfig, **flags: object):
    return make_plan(config, **flags)  # type: ignore[arg-type]


def test_sizes() -> None:
    sizes = derive_sizes(12)
    assert (sizes.n_embd, sizes.n_head, sizes.n_kv_head) == (768, 6, 6)
    assert derive_sizes(5).n_embd == 384  # 320 rounded up to a multiple of 128
    assert derive_sizes(4, head_dim=64).n_head == 4
    assert derive_sizes(24, n_embd=1024, n_head=8).n_kv_head == 8


@pytest.mark.parametrize("bad", [{"depth": 0}, {"depth": 1000}, {"head_dim": 0}, {"n_embd": 100}])
def test_impossible_sizes(bad: dict[str, int]) -> None:
    with pytest.raises(UserError):
        derive_sizes(**{"depth": 4, **bad})  # type: ignore[arg-type]


def test_published_d24_run() -> None:
    # 16,704 steps of 2^19 tokens at 12 tokens per scaling parameter
    result = plan(D24, target_param_data_ratio=12, total_batch_size=2**19)
    assert result.num_steps == pytest.approx(16_704, rel=0.01)


def test_precedence_of_horizons() -> None:
    flags = {"total_batch_size": 2**19}
    assert plan(D24, num_iterations=7, target_flops=1e12, **flags).num_steps == 7
    assert plan(D24, target_flops=estimate(D24)[0] * 2**19 * 5, **flags).num_steps == 5
    assert plan(D24, **flags).horizon == "--target-param-data-ratio"
    with pytest.raises(UserError, match="--target-param-data-ratio"):
        plan(D24, target_param_data_ratio=-1, **flags)
    with pytest.raises(UserError, match="num-iterations"):
        plan(D24, num_iterations=0)


def test_small_ratios_are_planned_and_an_unset_one_is_the_reference() -> None:
    assert plan(D24, target_param_data_ratio=0.05, total_batch_size=2**12).tokens_per_param == pytest.approx(
        0.05, rel=0.01
    )
    flags = {"target_flops": 1e19, "decay_by_horizon": True}
    assert plan(D24, target_param_data_ratio=-1, **flags) == plan(D24, **flags)


def test_batch_and_rates() -> None:
    assert optimal_batch_tokens(1e9, 1e9) == 2**19
    assert optimal_batch_tokens(8e9, 1e9) == 2**20  # 8^0.383 = 2.2
    result = plan(D24, num_iterations=1, total_batch_size=2**17 + 100)
    assert result.total_batch_tokens == 2**17 and result.lr_scale == pytest.approx(0.5)
    assert result.weight_decay == pytest.approx(0.05)  # 0.2 * (12/24)^2


def test_reference_depth_trains_at_the_reference_batch() -> None:
    config = GPTConfig()
    assert plan(config).total_batch_tokens == 2**19
    assert plan(config).tokens == pytest.approx(10.5 * scaling_params(estimate(config)[1]), rel=0.001)


def test_horizon_weight_decay_is_bounded() -> None:
    config = GPTConfig(n_layer=2, n_embd=256, n_head=2, n_kv_head=2)
    reference = 10.5 * scaling_params(estimate(GPTConfig())[1])
    flags = {"total_batch_size": 2**19, "decay_by_horizon": True, "weight_decay": 0.28, "matrix_lr": 0.02}
    long, short = plan(config, num_iterations=500, **flags), plan(config, num_iterations=20, **flags)
    assert long.weight_decay == pytest.approx(0.28 * reference / (500 * 2**19)) and not long.decay_bounded
    assert short.weight_decay * 0.02 == pytest.approx(0.1) and short.decay_bounded
    hot = plan(config, num_iterations=20, lr_scale=2.0, **flags)
    assert hot.weight_decay * 0.02 * hot.lr_scale == pytest.approx(0.1)
    assert plan(config, num_iterations=20, most_decay=0.05, **flags).weight_decay == short.weight_decay / 2
    assert not plan(config, num_iterations=20, **{**flags, "matrix_lr": 0.0}).decay_bounded
    shown = [dict(describe(config, result))["matrix weight decay"] for result in (short, long)]
    assert "bounded" in shown[0] and "bounded" not in shown[1]


def test_the_flag_of_the_rates_counts_as_the_recipes() -> None:
    """In the bound on the decay too, and in the plan."""
    config = GPTConfig(n_layer=2, n_embd=256, n_head=2, n_kv_head=2)
    flag, recipe = (
        plan(config, num_iterations=20, **plan_arguments(flags, name))
        for flags, name in ((PretrainConfig(lr_scale=4.0), "small"), (PretrainConfig(), "small,lr_scale=4"))
    )
    assert (flag.lr_scale, flag.weight_decay) == (recipe.lr_scale, recipe.weight_decay) and flag.decay_bounded
    assert flag.weight_decay * flag.lr_scale * 0.02 == pytest.approx(0.1)


def test_short_runs_get_higher_rates() -> None:
    config = GPTConfig(n_layer=2, n_embd=256, n_head=2, n_kv_head=2)
    reference = 10.5 * scaling_params(estimate(GPTConfig())[1])  # at depth 12
    flags = {"num_iterations": 100, "total_batch_size": 2**19, "horizon_exponent": 0.2}
    assert plan(config, **flags).lr_scale == pytest.approx((reference / (100 * 2**19)) ** 0.2)
    assert plan(config, **{**flags, "num_iterations": 10_000}).lr_scale == 1  # longer than the reference
    assert plan(config, **{**flags, "horizon_exponent": 0.0}).lr_scale == 1
    assert plan(config, **{**flags, "lr_scale": 3.0, "horizon_exponent": 0.0}).lr_scale == 3
    quarter = plan(config, num_iterations=100, total_batch_size=2**17, batch_exponent=0.25)
    assert quarter.lr_scale == pytest.approx(0.25**0.25)
