"""A run with a deadline ends on time, at any pace of the machine."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from toy_training import CPU, make_trainer

from nanochat import trainer as trainer_module
from nanochat.train.deadline import Deadline
from nanochat.train.metrics import Metrics
from nanochat.train.schedules import ScheduleConfig


def simulate(deadline: Deadline, guess: int, cost: Callable[[float], float], cut: bool = False) -> tuple[int, float]:
    """(steps, seconds) of a run in which a step that starts at second t takes cost(t).

    `cut` says whether it ends before its rates have fallen as planned.
    """
    step, now, schedule = 0, 0.0, ScheduleConfig(guess)
    while step < schedule.num_steps:
        now += cost(now)
        if schedule.apply([], step) > 0.5:
            deadline.last_high_step = step + 1
        step += 1
        schedule.num_steps = deadline.horizon(step, schedule.num_steps, now)
        assert schedule.num_steps >= step
    assert (deadline.cut(schedule) is not None) == cut
    return step, now


def stands_still(at: float, pause: float) -> Callable[[float], float]:
    """Steps of 0.7 s, except for the one during which the process is stopped."""
    return lambda now: 0.7 + pause * (now < at <= now + 0.7)


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
    steps, _ = simulate(deadline, 1000, lambda now: 3.0, cut=True)
    assert steps == 3  # one more would end after 12 s


def test_a_pause_shortens_the_run_by_its_own_length_only() -> None:
    """Not by the slow pace that it looks like: the rates fall as in any run of that many steps."""
    deadline, seen = Deadline(300, hooks_seconds=0, closing_seconds=10), []
    real = deadline.horizon

    def horizon(step: int, num_steps: int, now: float) -> int:
        seen.append((now, real(step, num_steps, now)))
        return seen[-1][1]

    deadline.horizon = horizon  # type: ignore[method-assign]
    steps, seconds = simulate(deadline, 414, stands_still(100, 90))
    assert steps == pytest.approx(200 / 0.7, abs=2) and seconds == pytest.approx(290, abs=1.5)
    assert all(abs(planned - steps) <= 3 for now, planned in seen if now > 190)
    assert deadline.paused_seconds == pytest.approx(90, abs=1)


def test_a_pause_past_the_end_is_said_to_cut_the_decay() -> None:
    deadline = Deadline(300, hooks_seconds=0, closing_seconds=10)
    steps, _ = simulate(deadline, 414, stands_still(100, 900), cut=True)
    assert steps == pytest.approx(100 / 0.7, abs=2)
    cut = deadline.cut(ScheduleConfig(steps))
    assert cut and "15m00s" in cut
    assert deadline.cut(ScheduleConfig(steps, warmdown_ratio=0)) is None, "nothing was to fall"
    assert deadline.cut(ScheduleConfig(steps, final_lr_frac=1)) is None


def test_evaluations_are_no_pauses() -> None:
    """They are part of the pace: each takes a fifth of the run."""
    deadline = Deadline(300, hooks_seconds=60, closing_seconds=10)
    _, seconds = simulate(deadline, 414, lambda now: 0.7 + 60 * (100 < now <= 100.7))
    assert seconds == pytest.approx(230, abs=5) and deadline.paused_seconds == 0


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


def test_a_stopped_process_is_told_that_its_decay_was_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.1 if not 10 < now < 11 else 500.0
        return now

    monkeypatch.setattr(trainer_module.time, "perf_counter", clock)
    trainer = make_trainer(steps=10_000)
    trainer.deadline = Deadline(20, hooks_seconds=0, closing_seconds=1)
    trainer.run()
    warning = capsys.readouterr().err
    assert "--minutes" in warning and "8m20s" in warning


def test_forecasts_wait_until_they_are_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --minutes the time left is known, the number of steps not; without it, the other way round."""
    now = 100.0
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: now)
    record = {"tokens_per_second": 1.0, "seconds": 0.0, "wait_seconds": 0.0}
    for deadline in (None, Deadline(60, hooks_seconds=0)):
        trainer = make_trainer(steps=1000)
        trainer.started, trainer.deadline = now, deadline
        metrics = Metrics(tmp_path / "metrics.jsonl", CPU, flops_per_token=1, peak_flops=0)
        lines = []
        for step, seconds in enumerate([20.0, *[0.5] * 9], 1):  # the first one compiles
            now += seconds
            trainer.progress.step = step
            if deadline:
                trainer.schedule.num_steps = deadline.horizon(step, trainer.schedule.num_steps, now - trainer.started)
            metrics(trainer, record | {"step": step})
            lines.append(metrics.line(trainer, record))
        metrics.close()
        if deadline:
            assert "step 1 |" in lines[0] and lines[0].endswith("| 40s left") and "step 6 |" in lines[5]
            assert f"step 10/{10 + round(30.5 / 0.5)} |" in lines[9] and lines[9].endswith("| 36s left")
        else:
            assert lines[5].startswith("step 6/1000 |") and not any("left" in line for line in lines[:6])
            assert lines[9].endswith("| 8m15s left")


def test_a_share_above_the_whole_peak_is_not_shown(tmp_path: Path) -> None:
    """The peak was measured beside other work then, so that later shares would be wrong too."""
    trainer = make_trainer(steps=10)
    metrics = Metrics(tmp_path / "metrics.jsonl", CPU, flops_per_token=1, peak_flops=100.0)
    shares = []
    for metrics.rate in (50.0, 120.0, 50.0):
        shares.append("50% of peak" in metrics.line(trainer, {}))
        assert ("of peak" in metrics.line(trainer, {})) == shares[-1]
    metrics.close()
    assert shares == [True, False, False]
