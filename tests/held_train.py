"""base_train that waits before a step while a file exists; launched in test_network.

BASE/hold/2-20 holds a run of two ranks after 20 steps; it creates BASE/held/2-20 when it gets there. A rank that
receives a stop signal continues.
"""

import time

from nanochat.common import get_base_dir
from nanochat.data.batches import Batch
from nanochat.trainer import Record, Trainer
from scripts import _cli, base_train

take_step = Trainer._take_step


def held_step(self: Trainer, batch: Batch) -> Record:
    name = f"{self.runtime.world_size}-{self.progress.step}"
    while (get_base_dir() / "hold" / name).exists() and self.stop_signal is None:
        (get_base_dir() / "held" / name).touch()
        time.sleep(0.01)
    return take_step(self, batch)


if __name__ == "__main__":
    Trainer._take_step = held_step  # type: ignore[method-assign]
    _cli.run(base_train.main)
