"""Ending on time: a horizon that follows the clock."""

from collections import deque
from dataclasses import dataclass, field

SETTLING_STEPS = 5  # of a session, before their pace says anything
CHECKS = 100  # looks at the clock over the run


@dataclass
class Deadline:
    """Moves a run's last step so that all of it, what follows the last step included, takes `seconds`.

    A pace measured before a run is right for that moment, and other work on the machine comes and goes. So the steps
    that are left are counted again every hundredth of the run, from how long the latest half of them took, with all
    evaluations and saves between. The schedules are functions of the share of the run that is done and follow.
    """

    seconds: float  # from the run's start
    observing_seconds: float  # expected of what watches the last step: evaluations, samples
    closing_seconds: float = 5.0  # and of the save and the report after it
    _times: deque[tuple[int, float]] = field(default_factory=deque)  # (step, seconds since the run's start)
    _next_check: int = 0

    def go_on(self, step: int, seconds: float) -> None:
        """Of a resumed run: its first `step` steps took `seconds`. Else a session's first few steps would move the
        horizon, and with it the rates in the middle of the run."""
        if step:
            self._times.append((step // 2, seconds / 2))

    def horizon(self, step: int, num_steps: int, now: float) -> int:
        """The number of steps to plan for, now that `step` of `num_steps` are done, `now` seconds after the start.

        At least `step`. Several processes must give the same `now`, and then decide alike.
        """
        self._times.append((step, now))
        if len(self._times) <= SETTLING_STEPS or step < self._next_check or step >= num_steps:
            return num_steps
        while len(self._times) > 2 * SETTLING_STEPS and self._times[1][0] <= step / 2:
            self._times.popleft()
        first_step, first_time = self._times[0]
        pace = (now - first_time) / (step - first_step)
        left = self.seconds - self.observing_seconds - self.closing_seconds - now
        horizon = step + max(0, round(left / pace))
        self._next_check = step + max(1, horizon // CHECKS)
        return horizon
