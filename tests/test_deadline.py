"""A run with a deadline ends on time, at any pace of the machine."""

from collections.abc import Callable
from functools import partial

import pytest
from toy_training import make_trainer

from nanochat import trainer as trainer_module
from nanochat.train.deadline import Deadline


def simulate(deadline: Deadline, guess: int, cost: Callable[[float], float]) -> tuple[int, float]:
    """(steps, seconds) of a run in which a step that starts at second t takes cost(t)."""
    step, now, horizon = 0, 0.0, guess
    while step < horizon:
        now += cost(now)
        step += 1
        horizon = deadline.horizon(step, horizon, now)
        assert horizon >= step
    return step, now


@pytest.mark.parametrize("guess", [100, 400, 3000])  # four times too few, right, far too many
def test_a_wrong_guess_is_corrected(guess: int) -> None:
    steps, seconds = simulate(Deadline(300, hooks_seconds=8, closing_seconds=2), guess, lambda now: 0.7)
    assert seconds == pytest.approx(290, abs=1.5) and steps == pytest.approx(290 / 0.7, abs=2)


@pytest.mark.parametrize("slower", [0.5, 2.0])
def test_a_pace_that_changes(slower: float) -> None:
    _, seconds = simulate(
        Deadline(300, hooks_seconds=0, closing_seconds=10), 400, lambda now: 0.7 * (slower if now > 150 else 1)
    )
    assert seconds == pytest.approx(290, rel=0.01)


def test_a_late_run_stops_at_once() -> None:
    deadline = Deadline(10, hooks_seconds=0, closing_seconds=5)
    steps, _ = simulate(deadline, 1000, lambda now: 3.0)
    assert steps == 6  # the first steps are not measured


def test_time_is_kept_for_the_last_evaluation() -> None:
    deadline = Deadline(300, hooks_seconds=0, closing_seconds=0)
    deadline.hooks_seconds = 60
    _, seconds = simulate(deadline, 400, lambda now: 0.7)
    assert seconds == pytest.approx(240, abs=1.5)


def test_a_resumed_session_keeps_the_horizon_in_its_slow_first_steps() -> None:
    """The earlier session's 60 s include evaluations, which no step's time shows."""
    deadline = Deadline(100, hooks_seconds=0, closing_seconds=0)
    deadline.resume(600, 60.0)
    now, horizons = 60.0, [1000]
    for step in range(601, 621):
        now += 0.2
        horizons.append(deadline.horizon(step, horizons[-1], now))
    assert all(abs(horizon - 1000) < 60 for horizon in horizons), horizons
    assert horizons[-1] < 1000


def test_the_trainer_follows_the_deadline_and_runs_its_last_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(x / 10 for x in range(10**6))  # each look at the clock a tenth of a second later
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: next(clock))
    trainer = make_trainer(steps=10_000)
    trainer.deadline = Deadline(20, hooks_seconds=0, closing_seconds=1)
    seen: list[int] = []
    trainer.hooks = [trainer_module.Hook(lambda t: seen.append(t.progress.step))]
    saved: list[int] = []
    trainer.snapshot = lambda t: partial(saved.append, t.progress.step)
    progress = trainer.run()
    assert progress.step == trainer.schedule.num_steps < 100
    assert seen == saved == [progress.step] and progress.wall_seconds == pytest.approx(19, abs=2)
