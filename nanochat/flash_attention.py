"""Causal attention with sliding windows behind one signature, whatever the hardware.

Shapes: B batch, T time, S keys, H query heads, G key/value heads (G divides H), D head size.
`window_size=(left, 0)` lets position t see keys t-left .. t; left >= T-1 is plain causal attention.

Backends of `flash_attn.flash_attn_func`, chosen by device, dtype and head size (choose_backend):
  fa3      FlashAttention 3, in 16 bits on Hopper: flash_attn_interface built by hand, or downloaded by the package
           `kernels` (the extra `fa3`)
  flex     torch flex_attention with block-sparse windows, in a compiled loss on other CUDA devices
  sdpa     PyTorch's scaled_dot_product_attention, on CUDA outside torch.compile: flex would be compiled anew for each
           length of a prompt. In a compiled loss where flex fails, and before compute capability 8.0, which Triton
           does not support
  blocked  plain matrix products over blocks of queries, everywhere else. A block reads only the keys in its window, so
           the cost falls with the window and no T x T mask exists. On CPUs forward and backward together are faster
           than PyTorch's flash kernel.

fa3 and flex are compared with attend_at_positions, gradients included, on a small example before their first use.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from nanochat.common import warn
from nanochat.cpu.fused import in_c
from nanochat.gpt_config import GPTConfig

AttentionFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


# ---------------------------------------------------------------------------------------------------
# blocked: matrix products over blocks of queries


def query_block(window: int, element_bytes: int) -> int:
    """Queries per block: large blocks waste work at the edge of a narrow window, small ones make the matrix products
    inefficient, in 16 bits sooner (bench/attention.py)."""
    return (64 if window < 256 else 128) * (2 if element_bytes == 2 else 1)


def _block_spans(length: int, window: int, size: int) -> list[tuple[int, int, int]]:
    """(first key, first query, end) per block of `size` queries; keys and queries share the end."""
    return [(max(0, start - window), start, min(start + size, length)) for start in range(0, length, size)]


@in_c("block_softmax_")
def block_softmax_(scores: torch.Tensor, first: int, window: int, scale: float) -> torch.Tensor:
    """scores (N, Q, K) -> probabilities, in place. Query i is at key position `first` + i and sees itself and
    `window` keys before it."""
    query = first + torch.arange(scores.size(1), device=scores.device)[:, None]
    key = torch.arange(scores.size(2), device=scores.device)[None, :]
    hidden = (key > query) | (query - key > window)
    return torch.softmax(scores.mul_(scale).masked_fill_(hidden, -torch.inf), dim=-1)


@in_c("block_softmax_backward_")
def block_softmax_backward_(grad: torch.Tensor, weights: torch.Tensor, scale: float) -> torch.Tensor:
    """Gradient of the scores from that of the probabilities, both (N, Q, K), in place."""
    row_sum = (grad * weights).sum(-1, keepdim=True)
    return grad.sub_(row_sum).mul_(weights).mul_(scale)


class _BlockedAttention(torch.autograd.Function):
    """q, k, v: (N, T, D) with N = B*H -> (N, T, D). Keeps the probabilities, only within the window."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        scale = 1 / math.sqrt(q.size(-1))
        out = torch.empty_like(q)
        kept = []
        spans = _block_spans(q.size(1), window, query_block(window, q.element_size()))
        for lo, start, end in spans:
            scores = torch.bmm(q[:, start:end], k[:, lo:end].transpose(1, 2))  # (N, queries, keys)
            weights = block_softmax_(scores, start - lo, window, scale)
            out[:, start:end] = torch.bmm(weights, v[:, lo:end])
            kept.append(weights)
        ctx.spans = spans
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, *kept = ctx.saved_tensors
        grad = grads[0].contiguous()
        scale = 1 / math.sqrt(q.size(-1))
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (lo, start, end), weights in zip(ctx.spans, kept):
            part = grad[:, start:end]
            dv[:, lo:end].baddbmm_(weights.transpose(1, 2), part)
            dscores = torch.bmm(part, v[:, lo:end].transpose(1, 2))
            dscores = block_softmax_backward_(dscores, weights, scale)
            dq[:, start:end] = torch.bmm(dscores, k[:, lo:end])
            dk[:, lo:end].baddbmm_(dscores.transpose(1, 2), q[:, start:end])
        return dq, dk, dv, None


@in_c("block_attention")
def block_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Causal attention: q, k, v (N, T, D) with N = B*H -> (N, T, D)."""
    return _BlockedAttention.apply(q, k, v, window)


def _blocked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    B, T, H, D = q.shape
    repeat = H // k.size(2)
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
    q, k, v = (x.transpose(1, 2).reshape(B * H, T, D) for x in (q, k, v))
    y = block_attention(q, k, v, min(window, T))
    return y.view(B, H, T, D).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------
# flex and FlashAttention 3 (CUDA)


BlockMask = Any
BLOCK = 128  # queries and keys of one entry of a block mask, as PyTorch makes them by default
block_masks: dict[tuple[int, int, str], BlockMask] = {}  # by length, window, device


def prepare(config: GPTConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Choose the backend of a compiled loss and build the masks of its rows. Call it before torch.compile traces:
    nothing can be tried then, and what is computed while tracing is recomputed at every step."""
    group = config.n_head // config.n_kv_head
    if choose_backend(device, dtype, config.head_dim, group, compiling=True) == "flex":
        for window in {min(window, config.sequence_len) for window, _ in config.window_sizes()}:
            block_masks[config.sequence_len, window, str(device)] = block_mask(config.sequence_len, window, device)


def block_mask(length: int, window: int, device: torch.device) -> BlockMask:
    """Which blocks of keys each block of queries sees wholly or in part: what create_block_mask would find by looking
    at all length x length pairs."""
    from torch.nn.attention.flex_attention import BlockMask

    def visible(b: Any, h: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (query - key <= window)

    block = torch.arange(-(-length // BLOCK), device=device)
    ahead = (block[:, None] - block) * BLOCK  # from a block of keys to a block of queries
    seen = (ahead >= 0) & (ahead - (BLOCK - 1) <= window)
    whole = (ahead > 0) & (ahead + (BLOCK - 1) <= window) & ((block[:, None] + 1) * BLOCK <= length)
    partial, full = (_ordered(x) for x in (seen & ~whole, whole))
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK, visible, seq_lengths=(length, length))


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q, K) bool -> (1, 1, Q) number of True and (1, 1, Q, K) their columns, then the other columns."""
    columns = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], columns.int()[None, None]


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    kernel: Any = flex_attention  # mypy does not know how to call it
    key = (q.size(1), min(window, q.size(1)), str(q.device))
    mask = block_masks[key] if key in block_masks else block_mask(*key[:2], q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return kernel(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


@functools.cache
def fa3_kernel() -> Any:
    """flash_attn_func of FlashAttention 3, or None. `kernels` downloads it into Hugging Face's cache once."""

    def built_by_hand() -> Any:
        from flash_attn_interface import flash_attn_func

        return flash_attn_func

    def downloaded() -> Any:
        from kernels import get_kernel

        return get_kernel("kernels-community/flash-attn3", version=1).flash_attn_func

    for package, load in (("flash_attn_interface", built_by_hand), ("kernels", downloaded)):
        if importlib.util.find_spec(package) is not None:
            try:
                return load()
            except Exception as error:  # not built for this torch or GPU, no network: HF_HUB_OFFLINE=1 uses the cache
                warn(f"FlashAttention 3 from the package {package} is not used, training is slower: {error}")
    return None


def _fa3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, kernel: Any) -> torch.Tensor:
    options = {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
    out = kernel(q, k, v, causal=True, window_size=(window, 0), **options)
    return out[0] if isinstance(out, tuple) else out  # older builds add the log-sum-exp


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    T = q.size(1)
    if window >= T - 1:
        return scaled_dot_product(q, k, v, causal=True)
    position = torch.arange(T, device=q.device)
    distance = position[:, None] - position
    return scaled_dot_product(q, k, v, (distance >= 0) & (distance <= window))


def scaled_dot_product(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, causal: bool = False
) -> torch.Tensor:
    """PyTorch's scaled_dot_product_attention in this file's layout: q (B, T, H, D), k and v (B, S, G, D) -> like q.

    `mask` broadcasts to (B, 1, T, S): True where visible, or what is added to the scores, in q's dtype. Which kernel
    runs on CUDA: FlashAttention 2 without a mask, in 16 bits, from compute capability 8.0 on; the memory-efficient one
    otherwise; never cuDNN's, which Runtime.create switches off. Several layers of one mask are served best by an
    additive one whose S is a multiple of 8: others are converted or padded in every call.
    """
    B, T, H, D = q.shape
    G = k.size(2)
    if T == 1:  # the queries of a group of heads see the same keys: they take the place of T
        return F.scaled_dot_product_attention(
            q.reshape(B, G, H // G, D), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
        ).reshape(B, 1, H, D)
    if G != H:  # with enable_gqa, what the fused kernels do not do would keep all T x S scores in float32
        k, v = k.repeat_interleave(H // G, dim=2), v.repeat_interleave(H // G, dim=2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)


BACKENDS: dict[str, AttentionFunction] = {"flex": _flex, "sdpa": _sdpa, "blocked": _blocked}  # and "fa3", once loaded
chosen: dict[tuple[Any, ...], str] = {}  # backend by device, dtype, head size, query heads per key head, compiling


def choose_backend(device: torch.device, dtype: torch.dtype, head_dim: int, group: int, compiling: bool) -> str:
    """The fastest backend that is right on this device, inside torch.compile or outside. Remembered in `chosen`."""
    key = (device.type, dtype, head_dim, group, compiling)
    if key not in chosen:
        usable = (name for name in candidates(device, dtype, compiling) if is_right(name, device, *key[1:]))
        chosen[key] = next(usable)
    return chosen[key]


def candidates(device: torch.device, dtype: torch.dtype, compiling: bool) -> list[str]:
    """Backends for tensors of that device and dtype, the fastest first, the last one always right."""
    if device.type != "cuda":
        return ["blocked"]
    capability, found = torch.cuda.get_device_capability(), ["sdpa"]
    if compiling and capability >= (8, 0):
        found.insert(0, "flex")
    if capability[0] == 9 and dtype in (torch.bfloat16, torch.float16) and (kernel := fa3_kernel()) is not None:
        BACKENDS["fa3"] = functools.partial(_fa3, kernel=kernel)
        found.insert(0, "fa3")
    return found


def is_right(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, group: int, compiling: bool
) -> bool:
    """Whether a GPU kernel and its gradients agree with attend_at_positions on a small example; if not, warn.

    Also finds what torch.compile does not take whole, and kernels that need more shared memory than the GPU has.
    """
    if backend not in ("fa3", "flex"):
        return True
    T, window, draw = 160, 40, torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():
        given = [torch.randn(1, T, heads, head_dim, generator=draw) for heads in (group, 1, 1, group)]
        q, k, v, grad = (x.to(device, dtype).requires_grad_() for x in given)
        positions = torch.arange(T, device=device)[None]
        plain = attend_at_positions(q, k, v, positions, positions, window)
        wanted = [plain, *torch.autograd.grad(plain, (q, k, v), grad)]
        kernel = BACKENDS[backend]
        if compiling:
            kernel = torch.compile(kernel, dynamic=False, fullgraph=True)
        try:
            out = kernel(q, k, v, window)
            found = [out, *torch.autograd.grad(out, (q, k, v), grad)]
            errors = [(x - y).norm() / y.norm() for x, y in zip(found, wanted, strict=True)]
            error = float(torch.stack(errors).max().detach())
        except Exception as failure:  # an unsupported head size, a package of another version
            error = math.inf
            warn(f"attention kernel {backend}: {failure}")
    if error < 0.03:  # bfloat16 and TF32 stay below 0.01; a window off by one key makes 0.08 or more
        return True
    warn(f"attention kernel {backend} differs from PyTorch (relative error {error:.2g}): not used, slower")
    return False


# ---------------------------------------------------------------------------------------------------
# the one signature


def flash_attn_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = True, window_size: tuple[int, int] = (-1, -1)
) -> torch.Tensor:
    """Causal attention. q (B, T, H, D), k and v (B, T, G, D) -> (B, T, H, D).

    `window_size[0] < 0` means no window. Only causal attention is implemented.
    """
    assert causal and window_size[1] <= 0, "only causal attention is implemented"
    assert q.size(2) % k.size(2) == 0, "query heads must be a multiple of key/value heads"
    window = window_size[0] if window_size[0] >= 0 else q.size(1)
    compiling = torch.compiler.is_compiling()
    key = (q.device.type, q.dtype, q.size(3), q.size(2) // k.size(2), compiling)
    if key in chosen:
        backend = chosen[key]
    elif compiling:  # nothing can be tried while tracing
        backend = "sdpa" if q.device.type == "cuda" else "blocked"
    else:
        backend = choose_backend(q.device, *key[1:])
    return BACKENDS[backend](q, k, v, window)


def attend_at_positions(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_pos: torch.Tensor, key_pos: torch.Tensor, window: int
) -> torch.Tensor:
    """Attention over keys in any order, each with its position. The plain definition that kernels are checked against.

    q (B, T, H, D); k, v (B, S, G, D); query_pos (B, T); key_pos (B, S), negative for an empty slot.
    A query sees the keys at positions pos-window .. pos. Returns (B, T, H, D).
    """
    distance = query_pos[:, :, None] - key_pos[:, None, :]  # (B, T, S)
    visible = (distance >= 0) & (distance <= window) & (key_pos >= 0)[:, None, :]
    return scaled_dot_product(q, k, v, visible[:, None])


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """Published form: write k, v (B, T, G, D) into the caches (B, S, G, D) after each row's `cache_seqlens`
    (B,) tokens, in place, then attend from q (B, T, H, D). nanochat's own engine keeps windowed layers in
    ring buffers instead (kv_cache.KVCache)."""
    assert causal
    B, T = q.shape[:2]
    S = k_cache.size(1)
    lengths = torch.zeros(B, dtype=torch.long, device=q.device) if cache_seqlens is None else cache_seqlens.long()
    if k is None or v is None:
        lengths = lengths - T  # the new keys are already in the cache
    else:
        slots = lengths[:, None] + torch.arange(T, device=q.device)  # (B, T)
        rows = torch.arange(B, device=q.device)[:, None]
        k_cache[rows, slots], v_cache[rows, slots] = k.to(k_cache.dtype), v.to(v_cache.dtype)
    query_pos = lengths[:, None] + torch.arange(T, device=q.device)
    key_pos = torch.arange(S, device=q.device).expand(B, S)
    return attend_at_positions(q, k_cache, v_cache, query_pos, key_pos, window_size[0] if window_size[0] >= 0 else S)


flash_attn = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)
"""The published handle: `flash_attn.flash_attn_func(...)`."""
