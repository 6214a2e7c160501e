"""A GPU on a machine without one: code that asks for CUDA runs on the CPU, and memory is counted, not used."""

from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from nanochat.gpt import GPT

MIB, NOMINAL = 2**20, 2.0**30  # bytes; the latter decides how the loss is computed, whatever a test's card has


class OnCpu(TorchFunctionMode):
    """Replaces CUDA devices by the CPU in every call of PyTorch's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def place(device: torch.device) -> torch.device:
            return torch.device("cpu") if device.type == "cuda" else device

        return func(*tree_map_only(torch.device, place, args), **tree_map_only(torch.device, place, kwargs or {}))


class FakeCard:
    """A GPU with `total` bytes. `usage(model, rows, T)` is what a micro-batch of `rows` rows of T tokens takes."""

    def __init__(self, total: float, usage: Callable[[GPT, int, int], float]) -> None:
        self.total, self.usage = total, usage
        self.fraction, self.peak = 1.0, 0.0
        self.compiled: list[tuple[int, int]] = []  # shapes, in the order of their first use
        self.trained: list[tuple[int, int]] = []  # of all micro-batches

    def run(self, model: GPT, rows: int, T: int) -> None:
        """Count a micro-batch. Raises OutOfMemoryError if it does not fit."""
        if (rows, T) not in self.compiled:
            self.compiled.append((rows, T))
        taken = self.usage(model, rows, T)
        if taken > self.fraction * self.total:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {taken / MIB:.2f} MiB")
        self.trained.append((rows, T))
        self.peak = max(self.peak, taken)

    def set_fraction(self, fraction: float, device: Any = None) -> None:
        self.fraction = fraction

    def reset_peak(self, device: Any = None) -> None:
        self.peak = 0.0


@contextmanager
def fake_card(monkeypatch: pytest.MonkeyPatch, card: FakeCard):
    """Scripts find `card` in the block, and compile for it without a compiler."""
    values: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "set_device": None,
        "get_device_capability": (8, 6),
        "get_device_name": "Fake",
        "get_device_properties": SimpleNamespace(total_memory=NOMINAL),
        "get_arch_list": ["sm_86"],
        "synchronize": None,
        "empty_cache": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "mem_get_info": (card.total, card.total),
        "memory_allocated": 0,
        "memory_reserved": 0,
    }
    loss = GPT.loss

    def counted(model: GPT, inputs: torch.Tensor, *rest: Any) -> Any:
        if torch.is_grad_enabled():
            card.run(model, *inputs.shape)
        return loss(model, inputs, *rest)

    with monkeypatch.context() as patch:
        for name, value in values.items():
            patch.setattr(torch.cuda, name, lambda *args, value=value: value)
        patch.setattr(torch.cuda, "max_memory_reserved", lambda device=None: card.peak)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", card.reset_peak)
        patch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device=None: card.fraction)
        patch.setattr(torch.cuda, "set_per_process_memory_fraction", card.set_fraction)
        patch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        patch.setattr(GPT, "loss", counted)
        patch.setattr("nanochat.train.timing.measure_peak_flops", lambda runtime: 1e12)
        patch.setattr("nanochat.train.build.compiled_loss", lambda model, mode, runtime: model.loss)
        patch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: None)
        patch.setenv("NANOCHAT_DTYPE", "float32")
        patch.setenv("PYTORCH_ALLOC_CONF", "")  # as if set by the user: the process's own stays
        with OnCpu():
            yield card
