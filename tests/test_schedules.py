"""Schedules at exact points."""

from itertools import pairwise

import pytest

from nanochat.train.schedules import decay_multiplier, lr_multiplier, muon_momentum


def test_learning_rate_at_exact_points() -> None:
    # 100 steps, 10 of warm-up, the last 50 down to 0.1
    at = [lr_multiplier(s, 100, 10, 0.5, 0.1) for s in range(101)]
    assert at[0] == pytest.approx(0.1) and at[9] == 1.0 and at[49] == 1.0 and at[50] == 1.0
    assert at[75] == pytest.approx(0.5 + 0.5 * 0.1)
    assert at[99] == pytest.approx(1 / 50 + 49 / 50 * 0.1)
    assert at[100] == pytest.approx(0.1)


def test_a_warmup_longer_than_the_run_leaves_time_to_warm_down() -> None:
    for steps in (30, 60):
        at = [lr_multiplier(s, steps, 40, 0.65) for s in range(steps)]
        assert max(at) == 1.0 and at[-1] <= 0.05 and at[steps // 2 :] == sorted(at[steps // 2 :], reverse=True)
        assert max(abs(b - a) for a, b in pairwise(at)) <= 0.1 + 1e-9, "no jump"


@pytest.mark.parametrize("warmup", [20, 33, 40])  # the last is cut to a third of the run
def test_where_warmup_and_warmdown_overlap_the_lower_one_counts(warmup: int) -> None:
    at = [lr_multiplier(s, 100, warmup, 0.9) for s in range(100)]
    assert at[0] == pytest.approx(1 / min(warmup, 33)) and at[33] == pytest.approx(67 / 90)
    assert max(abs(b - a) for a, b in pairwise(at)) <= 1 / min(warmup, 33) + 1e-9, "no jump"


def test_rates_may_rise_towards_the_end() -> None:
    assert [lr_multiplier(s, 10, 2, 0.5, 3.0) for s in (0, 1, 5, 10)] == [0.5, 1.0, 1.0, 3.0]


def test_learning_rate_never_negative_past_the_horizon() -> None:
    assert all(lr_multiplier(s, 10, 0, 0.5, 0.0) >= 0 for s in range(50))


def test_no_warmdown() -> None:
    assert all(lr_multiplier(s, 10, 0, 0.0) == 1.0 for s in range(10))


def test_momentum() -> None:
    assert muon_momentum(0, 1000) == pytest.approx(0.85)
    assert muon_momentum(150, 1000) == pytest.approx(0.90)
    assert muon_momentum(300, 1000) == muon_momentum(900, 1000) == pytest.approx(0.95)
    assert muon_momentum(1000, 1000, warmdown_ratio=0.5) == pytest.approx(0.90)
    assert muon_momentum(40, 60) == pytest.approx(0.95)  # short runs warm up within a third


def test_weight_decay() -> None:
    assert [decay_multiplier(s, 4) for s in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert decay_multiplier(2, 4, "cosine") == pytest.approx(0.5)
