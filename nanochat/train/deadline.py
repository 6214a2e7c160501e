"""Finishing on time: the number of steps follows the clock."""

from collections import deque
from dataclasses import dataclass, field

from nanochat.common import format_seconds
from nanochat.train.schedules import ScheduleConfig

SETTLING_STEPS = 5  # of a session, before its pace is measured
SOUND_SECONDS = 3.0  # of steps, before what is left is forecast from them
CHECKS = 100  # over the run
PAUSE = 0.05  # of the run: a step that takes so much longer than usual was interrupted


@dataclass
class RecentPace:
    """Seconds per step over the latest half of all steps, evaluations and saves between them included."""

    times: deque[tuple[int, float]] = field(default_factory=deque)  # (step, seconds since the run's start)

    def add(self, step: int, now: float) -> None:
        """`step` steps are done after `now` seconds."""
        self.times.append((step, now))
        while len(self.times) > 2 * SETTLING_STEPS and self.times[1][0] <= step / 2:
            self.times.popleft()

    def leave_out(self, seconds: float) -> None:
        """Do not count the last `seconds`, in which the process stood still."""
        self.times = deque((step, time + seconds) for step, time in self.times)

    @property
    def seconds(self) -> float:
        """The time that was measured."""
        return self.times[-1][1] - self.times[0][1] if self.times else 0.0

    @property
    def is_sound(self) -> bool:
        """Whether enough was measured for a forecast."""
        return self.seconds >= SOUND_SECONDS

    @property
    def seconds_per_step(self) -> float:
        """The pace; at least two steps must have been added."""
        return self.seconds / (self.times[-1][0] - self.times[0][0])


@dataclass
class Deadline:
    """Moves a run's last step so that the whole run, final evaluation and save included, takes `seconds`.

    A pace measured before the run holds for that moment only: other work on the machine comes and goes. So every
    hundredth of the run the remaining steps are planned again, from the recent pace. The schedules depend on the share
    of the run that is done, and follow. The time in which the process is stopped (Ctrl-Z) counts, but not as pace; a
    sleeping machine's clock stands still on Linux and macOS, so that sleep does not count.
    """

    seconds: float  # from the run's start
    hooks_seconds: float  # expected of the hooks after the last step: evaluations, samples
    closing_seconds: float = 5.0  # expected of the save and the report after them
    paused_seconds: float = 0.0  # in which the process stood still
    pace: RecentPace = field(default_factory=RecentPace)
    last_high_step: int = 0  # the last step whose rates were above half of their peak
    _next_check: int = 0

    @property
    def is_measured(self) -> bool:
        """Whether the number of steps follows from the pace of steps by now, not from an estimate before them."""
        return self.pace.is_sound and len(self.pace.times) > SETTLING_STEPS

    def resume(self, step: int, seconds: float) -> None:
        """Count the `step` steps of earlier sessions, which took `seconds`.

        Otherwise a session's first few, slow steps would move the horizon, and the rates in the middle of the run.
        """
        if step:
            self.pace.add(step // 2, seconds / 2)

    def horizon(self, step: int, num_steps: int, now: float) -> int:
        """The number of steps to plan for, at least `step`: `step` of `num_steps` are done after `now` seconds.

        All ranks must pass the same `now` to get the same answer.
        """
        self._leave_out_pause(now)
        self.pace.add(step, now)
        if len(self.pace.times) <= SETTLING_STEPS:
            waits = len(self.pace.times) < 2 or now + self.pace.seconds_per_step <= self.seconds
        else:
            waits = step < self._next_check
        if waits or step >= num_steps:
            return num_steps
        left = self.seconds - self.hooks_seconds - self.closing_seconds - now
        horizon = step + max(0, round(left / self.pace.seconds_per_step))
        self._next_check = step + max(1, horizon // CHECKS)
        return horizon

    def _leave_out_pause(self, now: float) -> None:
        """If the step that ends `now` was interrupted, take the excess over the usual out of the pace."""
        if len(self.pace.times) < 2:
            return
        pause = now - self.pace.times[-1][1] - self.pace.seconds_per_step - self.hooks_seconds
        if pause > PAUSE * self.seconds:
            self.paused_seconds += pause
            self.pace.leave_out(pause)
            self._next_check = 0  # the horizon moves now

    def cut(self, schedule: ScheduleConfig) -> str | None:
        """What to tell the user, at the end of the run, if time ran out before the rates had fallen as planned."""
        low_share = max(0.0, 0.5 - schedule.final_lr_frac) / (1 - schedule.final_lr_frac or 1)
        planned, taken = schedule.warmdown_steps * low_share, schedule.num_steps - self.last_high_step
        if taken >= planned / 2:
            return None
        pause = f", after standing still for {format_seconds(self.paused_seconds)}," if self.paused_seconds else ""
        return (
            f"the time of --minutes ran out{pause} before the learning rate had fallen: {taken} steps instead of about "
            f"{round(planned)} were below half of its peak; docs/training.md says how to train on"
        )
