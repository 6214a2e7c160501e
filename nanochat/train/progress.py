"""The state of the training loop itself, as checkpoints keep it."""

import math
from dataclasses import dataclass

# Scaling of the loss in float16, as in mixed precision training (arXiv 1710.03740) and torch.amp.GradScaler.
FIRST_LOSS_SCALE = 2.0**16
GOOD_STEPS_TO_DOUBLE = 2000

LOSS_MEMORY = 0.9  # of the average loss, for each step


@dataclass
class Progress:
    """Counters and averages of a run; saved with every checkpoint."""

    step: int = 0  # finished optimizer steps
    tokens: int = 0  # targets seen, over all ranks
    seconds: float = 0.0  # in training steps, over all sessions of the run
    wall_seconds: float = 0.0  # the same with evaluations, samples and saves
    smooth_loss: float = 0.0  # exponential average, not yet bias-corrected
    val_bpb: float | None = None
    best_val_bpb: float | None = None
    loss_scale: float = FIRST_LOSS_SCALE  # of float16 gradients
    good_steps: int = 0  # without overflow, since the scale last changed

    def add_step(self, loss: float, tokens: int, seconds: float) -> None:
        """Count one finished step with this mean loss over `tokens` targets."""
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        self.smooth_loss = LOSS_MEMORY * self.smooth_loss + (1 - LOSS_MEMORY) * loss

    def debiased_loss(self) -> float:
        """The average loss without the bias of its start at zero; NaN before the first step."""
        return self.smooth_loss / (1 - LOSS_MEMORY**self.step) if self.step else math.nan

    def adjust_loss_scale(self, overflowed: bool) -> None:
        """Halve the scale after an overflow, double it after GOOD_STEPS_TO_DOUBLE steps without one."""
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.loss_scale /= 2
        elif self.good_steps == GOOD_STEPS_TO_DOUBLE:
            self.loss_scale, self.good_steps = self.loss_scale * 2, 0
