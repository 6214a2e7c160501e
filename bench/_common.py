"""Shared by the benchmarks: flags, timing, memory, and the bare matrix products of linear layers."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from nanochat.common import UserError
from nanochat.dataset import starter_corpus
from nanochat.gpt import GPT, GPTConfig
from nanochat.recipe import get_recipe, resolve_recipe
from nanochat.runtime import Runtime, device_name
from nanochat.scaling import derive_sizes


@dataclass
class Flags:
    """Sizes, and how long to measure."""

    depth: int = 4
    """Layers; the width follows as in base_train."""
    head_dim: int = 64
    """Size of an attention head."""
    seq_len: int = 512
    """Tokens in a row."""
    batch: int = 16
    """Rows in a micro-batch, which is the whole batch here."""
    vocab_size: int = 8192
    """Tokens in the vocabulary, special tokens included."""
    window_pattern: str = "SSSL"
    """Per layer, tiled: S short window, L full context."""
    recipe: str = "default"
    """Features and rates: default, small, published, later, plain or portable, and changes (default,backout=False)."""
    dtype: str = ""
    """float32, bfloat16 or float16; empty chooses by the machine."""
    device_type: str = ""
    """cuda, mps or cpu; empty picks the best available."""
    seconds: float = 2.0
    """Time to spend on each action; each runs at least three times."""
    against: str = ""
    """A git revision to compare the working tree with."""
    rounds: int = 3
    """With --against: runs of each of the two."""

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 2), ("batch", 1), ("vocab_size", 1), ("seconds", 0), ("rounds", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")

    @property
    def tokens(self) -> int:
        """Tokens in a micro-batch."""
        return self.batch * self.seq_len


def model_config(flags: Flags) -> GPTConfig:
    """The network that base_train makes of the same flags."""
    sizes = derive_sizes(flags.depth, head_dim=flags.head_dim)
    recipe = resolve_recipe(flags.recipe, sizes.n_layer, sizes.n_embd)
    return get_recipe(recipe).model(
        sequence_len=flags.seq_len, vocab_size=flags.vocab_size, window_pattern=flags.window_pattern, **asdict(sizes)
    )


def circumstances(flags: Flags, runtime: Runtime) -> dict[str, Any]:
    """Settings and machine, reported with every result."""
    return {
        **{name: value for name, value in asdict(flags).items() if name not in ("against", "rounds")},
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "device": runtime.device.type,
        "device_name": device_name(runtime.device),
        "threads": torch.get_num_threads(),
    }


def starter_texts(split: str, chars: int) -> Iterator[str]:
    """Documents of the starter corpus, up to `chars` characters in all."""
    for document in starter_corpus().iter_documents(split):
        yield document.text[:chars]
        chars -= len(document.text)
        if chars <= 0:
            return


# ---------------------------------------------------------------------------------------------------
# Time


def sample_in_turn(
    actions: dict[str, Callable[[], Any]], seconds: float, runtime: Runtime, least: int = 3
) -> dict[str, list[float]]:
    """Seconds of every run of each action: one warm-up (discarded), then alternating, a b c a b c ...

    Goes on for about `seconds` for each action, and for at least `least` rounds.
    """
    for action in actions.values():
        action()
    samples: dict[str, list[float]] = {name: [] for name in actions}
    began = time.perf_counter()
    while least > 0 or time.perf_counter() - began < seconds * len(actions):
        for name, action in actions.items():
            runtime.synchronize()
            started = time.perf_counter()
            action()
            runtime.synchronize()
            samples[name].append(time.perf_counter() - started)
        least -= 1
    return samples


def time_in_turn(actions: dict[str, Callable[[], Any]], seconds: float, runtime: Runtime) -> dict[str, float]:
    """The median seconds of each action; see sample_in_turn."""
    return {name: median(times) for name, times in sample_in_turn(actions, seconds, runtime).items()}


# ---------------------------------------------------------------------------------------------------
# Memory


def peak_memory(runtime: Runtime) -> int:
    """Peak bytes so far: of tensors on a GPU, of the whole process elsewhere."""
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated(runtime.device)
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, ValueError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_during(action: Callable[[], Any], runtime: Runtime) -> tuple[int, int] | None:
    """(bytes before, peak bytes during) an action; None if the system cannot reset the peak."""
    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(runtime.device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # man proc_pid_clear_refs: the peak becomes what is held now
        except OSError:
            return None
    before = peak_memory(runtime)
    action()
    runtime.synchronize()
    return before, peak_memory(runtime)


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Memory of tensors; shared storage counts once, other objects are ignored."""
    storages = [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


# ---------------------------------------------------------------------------------------------------
# The matrix products of training


def linear_shapes(model: GPT) -> list[tuple[int, int]]:
    """(inputs K, outputs M) of every linear layer, the head without its padding."""
    return [
        (m.in_features, model.config.vocab_size if m is model.lm_head else m.out_features)
        for m in model.modules()
        if isinstance(m, nn.Linear)
    ]


class LinearProducts:
    """The bare matrix products of linear layers; calling it runs all of them once, into preallocated memory.

    For a layer (K, M) and N tokens, with x (N, K), weight w (M, K) and gradient g (N, M): the output x w', the
    input's gradient g w and the weight's gradient g' x. Layers share their memory.
    """

    def __init__(self, shapes: list[tuple[int, int]], num_tokens: int, runtime: Runtime) -> None:
        N = num_tokens
        self.flops = sum(6 * N * K * M for K, M in shapes)
        sizes = [N * max(K for K, _ in shapes), max(K * M for K, M in shapes), N * max(M for _, M in shapes)]
        like: dict[str, Any] = {"device": runtime.device, "dtype": runtime.dtype}
        given, made = [torch.randn(n, **like) for n in sizes], [torch.empty(n, **like) for n in sizes]
        self.products: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # (left, right, result)
        for K, M in shapes:
            x, w, g = _views(given, K, M, N)
            dx, dw, y = _views(made, K, M, N)
            self.products += [(x, w.T, y), (g, w, dx), (g.T, x, dw)]

    def __call__(self) -> None:
        for left, right, result in self.products:
            torch.mm(left, right, out=result)


def _views(flat: list[torch.Tensor], K: int, M: int, N: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, K), (M, K) and (N, M) in the beginnings of three flat tensors."""
    a, b, c = flat
    return a[: N * K].view(N, K), b[: M * K].view(M, K), c[: N * M].view(N, M)
