"""Every attention backend against the definition, written out in float64."""

import functools
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import flash_attention
from nanochat.flash_attention import attend_at_positions, candidates, flash_attn, flash_attn_func


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int = -1) -> torch.Tensor:
    """softmax(q k' / sqrt(D)) v over the keys t-window .. t, all pairs at once, in float64."""
    T, H, D = q.shape[1:]
    repeat = H // k.size(2)
    q, k, v = q.double(), k.double().repeat_interleave(repeat, 2), v.double().repeat_interleave(repeat, 2)
    seen = [[t - (T if window < 0 else window) <= s <= t for s in range(T)] for t in range(T)]
    scores = torch.einsum("bthd,bshd->bhts", q, k) / D**0.5
    weights = scores.masked_fill(~torch.tensor(seen), -float("inf")).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def random_qkv(
    B: int, T: int, H: int, G: int, D: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, heads, D, generator=generator, dtype=torch.float64).to(dtype) for heads in (H, G, G)]


# Lengths around the blocks of 64 and 128 queries, windows from nothing but oneself to more than everything.
SHAPES = [
    (1, -1),
    (1, 0),
    (5, 2),
    (63, 7),
    (64, 64),
    (65, 0),
    (65, 1),
    (128, 63),
    (129, 65),
    (150, -1),
    (150, 149),
    (150, 5000),
    (200, 128),
    (290, 256),
    (290, 257),
]


@pytest.mark.parametrize("T, window", SHAPES)
def test_blocked_matches_the_definition_and_its_gradients(T: int, window: int) -> None:
    heads = [(4, 4), (4, 2), (3, 1)][T % 3]
    tensors = [x.requires_grad_() for x in random_qkv(2, T, *heads, D=6)]
    copies = [x.detach().clone().requires_grad_() for x in tensors]
    out, wanted = flash_attn_func(*tensors, window_size=(window, 0)), reference(*copies, window)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-12)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((out * weights).sum(), tensors)
    wanted_grads = torch.autograd.grad((wanted * weights).sum(), copies)
    torch.testing.assert_close(grads, wanted_grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_blocked_in_working_precision(dtype: torch.dtype, tolerance: float) -> None:
    tensors = [x.requires_grad_() for x in random_qkv(2, 140, 4, 2, 16, dtype)]
    copies = [x.detach().double().requires_grad_() for x in tensors]
    out, wanted = flash_attn_func(*tensors, window_size=(50, 0)), reference(*copies, 50)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((out * weights).sum(), tensors)
    for ours, exact in zip(grads, torch.autograd.grad((wanted * weights).sum(), copies), strict=True):
        assert (ours.double() - exact).norm() <= tolerance * exact.norm()


def test_windowed_blocks_pass_gradcheck() -> None:
    tensors = [x.requires_grad_() for x in random_qkv(1, 5, 2, 1, 2)]
    assert torch.autograd.gradcheck(functools.partial(flash_attn_func, window_size=(2, 0)), tensors)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = random_qkv(1, 70, 2, 2, 8, torch.float32)
    out = flash_attn_func(q * 1e3, k * 1e3, v)
    torch.testing.assert_close(out.double(), reference(q * 1e3, k * 1e3, v), rtol=1e-3, atol=1e-3)


class Watch(TorchDispatchMode):
    """While open, remembers the largest rows x columns of any tensor made, and how many products were summed up."""

    largest = products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "bmm" in func.__name__:
            a, b = args[-2:]
            self.products += a.numel() * b.size(-1)
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.dim() >= 2:
                self.largest = max(self.largest, x.size(-1) * x.size(-2))
        return out


@pytest.mark.parametrize("window", [64, 1024])
def test_no_mask_of_all_pairs_is_ever_built(window: int) -> None:
    T = 1024
    tensors = [x.requires_grad_() for x in random_qkv(1, T, 1, 1, 4, torch.float32)]
    with Watch() as seen:
        flash_attn_func(*tensors, window_size=(window, 0)).sum().backward()
    assert seen.largest <= 128 * T < T * T


def test_cost_falls_with_the_window() -> None:
    def products(window: int) -> int:
        tensors = [x.requires_grad_() for x in random_qkv(1, 1024, 1, 1, 4, torch.float32)]
        with Watch() as seen:
            flash_attn_func(*tensors, window_size=(window, 0)).sum().backward()
        return seen.products

    full = products(1024)
    assert full >= 5 * 4 * 1024**2 / 2  # forward 2, backward 3, over the lower triangle
    assert products(256) < 0.65 * full and products(64) < 0.25 * full


# ---------------------------------------------------------------------------------------------------
# Backends that need other hardware: their wiring


@pytest.fixture
def flex_in_eager_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """flex_attention's own slow path, which runs anywhere: the same mask and layout, no compiler."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.mark.filterwarnings("ignore:.*flex_attention.*")
@pytest.mark.parametrize("T, window, G", [(150, 40, 2), (128, 5000, 4), (129, 0, 1)])
def test_flex_and_sdpa_see_the_same_keys(flex_in_eager_mode: None, T: int, window: int, G: int) -> None:
    q, k, v = random_qkv(2, T, 4, G, 16, torch.float32)
    for name in ("flex", "sdpa"):
        out = flash_attention.BACKENDS[name](q, k, v, window)
        torch.testing.assert_close(out.double(), reference(q, k, v, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("G", [1, 2, 6])
@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_torch_kernels_with_any_mask_and_groups_of_heads(T: int, G: int, kind: str) -> None:
    q, k, v = random_qkv(2, 9, 6, G, 8)
    q = q[:, :T]
    visible = torch.rand(2, 1, T, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    visible[..., 0] = True  # a query sees something
    mask = {"none": None, "bool": visible, "additive": torch.zeros(visible.shape).double().masked_fill(~visible, -1e9)}
    keys, values = k.repeat_interleave(6 // G, 2), v.repeat_interleave(6 // G, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, keys) / 8**0.5
    weights = (scores if kind == "none" else scores.masked_fill(~visible, -torch.inf)).softmax(-1)
    out = flash_attention.scaled_dot_product(q, k, v, mask[kind])
    torch.testing.assert_close(out, torch.einsum("bhts,bshd->bthd", weights, values), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("T", [1, 127, 128, 129, 300, 512])
def test_block_masks_are_those_of_all_pairs(T: int) -> None:
    for window in {0, 1, 5, 126, 127, 128, 129, 254, 255, 256, 257, 511, T - 1, T, T + 500}:
        ours = flash_attention.block_mask(T, window, torch.device("cpu"))
        theirs = create_block_mask(
            lambda b, h, q, k, window=window: (k <= q) & (q - k <= window), None, None, T, T, device="cpu"
        )
        assert ours.seq_lengths == theirs.seq_lengths and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
        names = [f"{full}{side}_{part}" for full in ("", "full_") for side in ["q", "kv"] for part in PARTS]
        for name in names:
            found, wanted = getattr(ours, name), getattr(theirs, name)
            assert found.dtype == wanted.dtype and torch.equal(found, wanted), (window, name)


PARTS = ("num_blocks", "indices")


def test_a_block_mask_takes_memory_for_its_blocks_only() -> None:
    with Watch() as seen:
        mask = flash_attention.block_mask(16384, 4096, torch.device("cpu"))
    assert mask.kv_indices.shape == (1, 1, 128, 128) and seen.largest <= 129 * 129


# ---------------------------------------------------------------------------------------------------
# The choice between them


@pytest.fixture(autouse=True)
def nothing_is_chosen_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(flash_attention, "chosen", {})
    monkeypatch.setattr(flash_attention, "BACKENDS", flash_attention.BACKENDS.copy())
    found = flash_attention.fa3_kernel
    found.cache_clear()
    yield
    found.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, package: str, **contents: Any) -> None:
    """A stand-in for an installed package."""
    module = ModuleType(package)
    module.__spec__ = ModuleSpec(package, loader=None)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, package, module)


class Kernel:
    """A stand-in for FlashAttention 3's flash_attn_func, with a fault."""

    def __init__(self, fault: str = "") -> None:
        self.fault, self.calls = fault, list[dict[str, Any]]()

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        self.calls.append(options)
        if self.fault == "unsupported":
            raise RuntimeError("this head size is not supported")
        out = reference(q, k, v, options["window_size"][0] + (self.fault == "window")).to(q.dtype)
        if self.fault == "gradient":
            out = out.detach() + 0 * (q.sum() + k.sum() + v.sum())
        if self.fault == "nan":
            out = out / (out != out[:, :1]).to(q.dtype)
        return (out, out.new_zeros(1)) if self.fault == "tuple" else out


@pytest.mark.parametrize("fault", ["", "tuple", "unsupported", "window", "gradient", "nan"])
def test_a_kernel_is_checked_before_its_first_use(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = Kernel(fault)
    monkeypatch.setitem(flash_attention.BACKENDS, "fa3", functools.partial(flash_attention._fa3, kernel=kernel))
    monkeypatch.setattr(flash_attention, "candidates", lambda *args: ["fa3", "sdpa"])
    q, k, v = random_qkv(1, 20, 2, 1, 4)
    with torch.inference_mode():
        for _ in range(2):
            found = flash_attn_func(q, k, v, window_size=(9, 0))
            torch.testing.assert_close(found, reference(q, k, v, 9), rtol=1e-4, atol=1e-5)
    usable = fault in ("", "tuple")
    assert list(flash_attention.chosen.values()) == ["fa3" if usable else "sdpa"]
    assert len(kernel.calls) == (3 if usable else 1) and bool(capsys.readouterr().err) != usable
    assert kernel.calls[-1] == {"causal": True, "window_size": (9 if usable else 40, 0)}


def test_fa3_is_deterministic_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    flash_attention._fa3(*random_qkv(1, 20, 2, 1, 4), 9, kernel)
    assert kernel.calls[0]["deterministic"] is True


@pytest.mark.parametrize(
    "by_hand, from_hub, found",
    [
        (None, None, None),
        ("works", None, "by hand"),
        (None, "works", "hub"),
        ("works", "works", "by hand"),
        ("broken", "works", "hub"),
        (None, "broken", None),
    ],
)
def test_where_fa3_comes_from(
    by_hand: str | None,
    from_hub: str | None,
    found: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def get_kernel(name: str, *, version: int) -> Any:
        asked.append(name)
        if from_hub == "broken":
            raise OSError("no network")
        return SimpleNamespace(flash_attn_func="hub")

    asked: list[str] = []
    if by_hand:
        install(monkeypatch, "flash_attn_interface", **({"flash_attn_func": "by hand"} if by_hand == "works" else {}))
    if from_hub:
        install(monkeypatch, "kernels", get_kernel=get_kernel)
    for _ in range(2):
        assert flash_attention.fa3_kernel() == found
    assert asked == ([] if by_hand == "works" or not from_hub else ["kernels-community/flash-attn3"])
    assert len(capsys.readouterr().err.splitlines()) == [by_hand, from_hub].count("broken")


@pytest.mark.parametrize(
    "device, capability, installed, dtype, compiled, eager",
    [
        ("cpu", None, True, torch.bfloat16, "blocked", "blocked"),
        ("mps", None, False, torch.float32, "blocked", "blocked"),
        ("cuda", (9, 0), True, torch.bfloat16, "fa3 flex sdpa", "fa3 sdpa"),
        ("cuda", (9, 0), True, torch.float32, "flex sdpa", "sdpa"),  # FlashAttention multiplies 16-bit numbers only
        ("cuda", (9, 0), False, torch.bfloat16, "flex sdpa", "sdpa"),
        ("cuda", (8, 0), True, torch.bfloat16, "flex sdpa", "sdpa"),
        ("cuda", (10, 0), True, torch.bfloat16, "flex sdpa", "sdpa"),  # the package is built for Hopper
        ("cuda", (7, 5), True, torch.float16, "sdpa", "sdpa"),
        ("cuda", (6, 1), True, torch.float32, "sdpa", "sdpa"),
    ],
)
def test_candidates(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    capability: Any,
    installed: bool,
    dtype: torch.dtype,
    compiled: str,
    eager: str,
) -> None:
    loaded = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: capability)
    monkeypatch.setattr(flash_attention, "fa3_kernel", lambda: loaded.append(1) or (Kernel() if installed else None))
    assert candidates(torch.device(device), dtype, compiling=True) == compiled.split()
    assert candidates(torch.device(device), dtype, compiling=False) == eager.split()
    assert bool(loaded) == (capability == (9, 0) and dtype == torch.bfloat16)  # nothing is downloaded that is not used


# ---------------------------------------------------------------------------------------------------
# Attention over a cache


@pytest.mark.parametrize("window", [-1, 0, 3, 100])
@pytest.mark.parametrize("pieces", [[9], [4, 1, 1, 3], [1] * 9])
def test_cache_filled_in_pieces_equals_one_pass(window: int, pieces: list[int]) -> None:
    q, k, v = random_qkv(2, 9, 4, 2, 8)
    caches = [torch.full((2, 16, 2, 8), 50.0, dtype=torch.float64) for _ in range(2)]  # stale values past the end
    done, outs = 0, []
    for size in pieces:
        now = slice(done, done + size)
        lengths = torch.tensor([done, done], dtype=torch.int32)
        outs.append(
            flash_attn.flash_attn_with_kvcache(
                q[:, now], *caches, k=k[:, now], v=v[:, now], cache_seqlens=lengths, window_size=(window, 0)
            )
        )
        done += size
    torch.testing.assert_close(torch.cat(outs, 1), reference(q, k, v, window), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(caches[0][:, :9], k)
    assert (caches[1][:, 9:] == 50).all()


def test_rows_of_different_lengths_share_a_cache() -> None:
    q, k, v = random_qkv(2, 7, 2, 2, 4)
    wanted = reference(q, k, v, 3)
    k_cache, v_cache = k.clone(), v.clone()
    k_cache[0, 5:] = v_cache[0, 5:] = k_cache[1, 2:] = v_cache[1, 2:] = 50.0
    at = torch.tensor([5, 2])
    rows = torch.arange(2)
    step = [x[rows, at][:, None] for x in (q, k, v)]
    out = flash_attn.flash_attn_with_kvcache(
        step[0], k_cache, v_cache, k=step[1], v=step[2], cache_seqlens=at, window_size=(3, 0)
    )
    torch.testing.assert_close(out[:, 0], wanted[rows, at], rtol=1e-10, atol=1e-12)


def test_query_alone_reads_what_the_cache_already_holds() -> None:
    q, k, v = random_qkv(1, 6, 2, 1, 4)
    caches = [torch.cat([x, torch.full((1, 3, 1, 4), 50.0)], 1) for x in (k, v)]
    out = flash_attn.flash_attn_with_kvcache(q[:, 4:], *caches, cache_seqlens=torch.tensor([6]), window_size=(2, 0))
    torch.testing.assert_close(out, reference(q, k, v, 2)[:, 4:], rtol=1e-10, atol=1e-12)


def test_keys_in_any_order_with_empty_slots() -> None:
    """As in a ring buffer: positions say where a key stands, negative ones that a slot is empty."""
    q, k, v = random_qkv(1, 8, 4, 2, 4)
    order = torch.tensor([5, 6, 7, 3, 4, 0, 1, 2, -1])
    keys, values = (x[:, order.clamp_min(0)].clone() for x in (k, v))
    keys[:, -1] = values[:, -1] = 50.0
    for window in (0, 4, 100):
        out = attend_at_positions(q[:, 7:], keys, values, torch.tensor([[7]]), order[None], window)
        torch.testing.assert_close(out, reference(q, k, v, window)[:, 7:], rtol=1e-10, atol=1e-12)
