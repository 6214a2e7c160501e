"""base_train that stands still before a step for as long as a file bids it: what is launched in test_network.

BASE/hold/2-20 holds a run of two processes that has done 20 steps; it tells by BASE/held/2-20 that it has come there.
A process that is told to stop goes on.
"""

import time
from typing import Any

from nanochat.common import get_base_dir
from nanochat.trainer import Trainer
from scripts import _cli, base_train

real_step = Trainer.step


def step(self: Trainer, batch: Any) -> Any:
    name = f"{self.runtime.world_size}-{self.progress.step}"
    while (get_base_dir() / "hold" / name).exists() and self.stop_signal is None:
        (get_base_dir() / "held" / name).touch()
        time.sleep(0.01)
    return real_step(self, batch)


if __name__ == "__main__":
    Trainer.step = step  # type: ignore[method-assign]
    _cli.run(base_train.main)
