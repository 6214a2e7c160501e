"""What several test files share: a model small enough to train in a test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanochat.gpt import GPT, GPTConfig

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """On tensors this small, threads only wait for each other: ten times as long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def goldens() -> Path:
    """The folder of numbers that are not our own."""
    return GOLDENS


@pytest.fixture
def tiny_config() -> GPTConfig:
    """Two layers, grouped-query attention, a vocabulary that needs padding."""
    return GPTConfig(sequence_len=32, vocab_size=300, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)


@pytest.fixture
def tiny_model(tiny_config: GPTConfig) -> GPT:
    """A freshly initialised tiny model on the CPU."""
    return GPT.create(tiny_config, seed=1)
