"""Small models, batches and trainers for the tests of the training loop."""

import numpy as np
import torch

from nanochat.data.batches import Batch, Loader
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, OptimizerConfig, build_param_groups
from nanochat.runtime import Runtime
from nanochat.train.schedules import ScheduleConfig
from nanochat.train.step import TrainStep
from nanochat.trainer import Trainer

CPU = Runtime(torch.device("cpu"), torch.float32, "test", seed=0)
CONFIG = GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)


class ToyLoader(Loader):
    """A loader without a position to save."""

    sequence_len = 16

    def state_dict(self) -> dict[str, np.ndarray]:
        return {}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        pass

    def stats(self) -> dict[str, float]:
        return {}


class RandomBatches(ToyLoader):
    """Endless random batches, the same for the same seed; some tokens have no target."""

    def __init__(self, rows: int = 6, seed: int = 0, weights: bool = False) -> None:
        self.rows, self.weights = rows, weights
        self.random = torch.Generator().manual_seed(seed)
        self.served = 0

    def next_batch(self) -> Batch:
        tokens = torch.randint(64, (self.rows, 17), generator=self.random)
        targets = tokens[:, 1:].clone()
        targets[: self.rows // 2, :10] = -1  # so that micro-batches hold unequal numbers of targets
        weights = torch.rand(self.rows, 16, generator=self.random) if self.weights else None
        self.served += 1
        return Batch(tokens[:, :-1].contiguous(), targets, weights, f"batch {self.served}")


class MarkovBatches(ToyLoader):
    """Text with something to learn: each token mostly follows from the one before it."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.next = self.rng.permutation(96)

    def next_batch(self) -> Batch:
        rows = np.empty((8, 65), np.int64)
        rows[:, 0] = self.rng.integers(96, size=8)
        for t in range(1, 65):
            noise = self.rng.random(8) < 0.2
            rows[:, t] = np.where(noise, self.rng.integers(96, size=8), self.next[rows[:, t - 1]])
        tokens = torch.from_numpy(rows)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, "markov")


def make_trainer(
    steps: int = 4,
    device_batch_size: int = 6,
    lr_scale: float = 0.2,
    runtime: Runtime = CPU,
    weights: bool = False,
) -> Trainer:
    model = GPT.create(CONFIG, seed=1)
    groups = build_param_groups(model, OptimizerConfig(), lr_scale=lr_scale, weight_decay=0.1, ns_dtype=torch.float32)
    step = TrainStep(model, MuonAdamW(groups), runtime, ScheduleConfig(steps), device_batch_size, model.loss)
    return Trainer(step, RandomBatches(weights=weights))
