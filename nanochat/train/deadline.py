"""Finishing on time: the number of steps follows the clock."""

from collections import deque
from dataclasses import dataclass, field

SETTLING_STEPS = 5  # of a session, before its pace is measured
CHECKS = 100  # over the run


@dataclass
class Deadline:
    """Moves a run's last step so that the whole run, final evaluation and save included, takes `seconds`.

    A pace measured before the run holds for that moment only: other work on the machine comes and goes. So every
    hundredth of the run the remaining steps are planned again, from the pace of the latest half of all steps,
    evaluations and saves between them included. The schedules depend on the share of the run that is done, and follow.
    """

    seconds: float  # from the run's start
    hooks_seconds: float  # expected of the hooks after the last step: evaluations, samples
    closing_seconds: float = 5.0  # expected of the save and the report after them
    _times: deque[tuple[int, float]] = field(default_factory=deque)  # (step, seconds since the run's start)
    _next_check: int = 0

    def resume(self, step: int, seconds: float) -> None:
        """Count the `step` steps of earlier sessions, which took `seconds`.

        Otherwise a session's first few, slow steps would move the horizon, and the rates in the middle of the run.
        """
        if step:
            self._times.append((step // 2, seconds / 2))

    def horizon(self, step: int, num_steps: int, now: float) -> int:
        """The number of steps to plan for, at least `step`: `step` of `num_steps` are done after `now` seconds.

        All ranks must pass the same `now` to get the same answer.
        """
        self._times.append((step, now))
        if len(self._times) <= SETTLING_STEPS or step < self._next_check or step >= num_steps:
            return num_steps
        while len(self._times) > 2 * SETTLING_STEPS and self._times[1][0] <= step / 2:
            self._times.popleft()
        first_step, first_time = self._times[0]
        pace = (now - first_time) / (step - first_step)
        left = self.seconds - self.hooks_seconds - self.closing_seconds - now
        horizon = step + max(0, round(left / pace))
        self._next_check = step + max(1, horizon // CHECKS)
        return horizon
