"""The cache against what needs none: full forward passes, and attention written out in float64."""

import random

import pytest
import torch
from stubs import stir

from nanochat.flash_attention import flash_attn_with_kvcache
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference.kv_cache import KVCache

SIZES = {"vocab_size": 70, "n_layer": 4, "n_head": 4, "n_embd": 32}
CONFIGS = {
    "published": GPTConfig(sequence_len=24, n_kv_head=4, **SIZES),
    "grouped": GPTConfig(sequence_len=24, n_kv_head=2, **SIZES),
    "one_kv_head": GPTConfig(sequence_len=24, n_kv_head=1, window_pattern="SL", **SIZES),
    "odd_window": GPTConfig(sequence_len=23, n_kv_head=2, window_pattern="S", **SIZES),
    "later": GPTConfig.later(sequence_len=24, n_kv_head=2, **SIZES),
    "ngrams": GPTConfig.later(sequence_len=24, n_kv_head=2, ngram_rows=97, ngram_dim=16, **SIZES),
    "later_windows": GPTConfig.later(sequence_len=24, n_kv_head=2, **{**SIZES, "short_window_divisor": 2}),
    "plain": GPTConfig.plain(sequence_len=24, n_kv_head=4, **SIZES),
}


def make_model(config: GPTConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT:
    """A model in which every feature matters: nothing is left at an initial zero."""
    return stir(GPT.create(config, compute_dtype=dtype).eval(), 0.2, seed).requires_grad_(False)


@pytest.fixture(scope="module")
def models() -> dict[str, GPT]:
    return {name: make_model(config) for name, config in CONFIGS.items()}


def random_ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(70, (rows, length), generator=torch.Generator().manual_seed(seed))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------
# The model with a cache = the model without


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("pieces", [[1] * 22 + [2], [24], [7, 17], [1, 1, 22], [5, 1, 1, 9, 1, 7], [22, 2]], ids=str)
def test_any_pieces_give_the_full_forward(models: dict[str, GPT], name: str, pieces: list[int]) -> None:
    model, length = models[name], models[name].config.sequence_len
    ids = random_ids(3, length)
    cache = KVCache(model.config, 3, length)
    got = [model(piece, kv_cache=cache) for piece in ids.split([*pieces[:-1], length - sum(pieces[:-1])], dim=1)]
    close(torch.cat(got, dim=1), model(ids))
    assert cache.lengths.tolist() == [length] * 3


def test_the_later_form_at_its_real_windows() -> None:
    config = GPTConfig.later(sequence_len=640, n_kv_head=2, **SIZES)
    assert config.short_window == 256
    model, ids = make_model(config), random_ids(1, 420)
    cache = KVCache(config, 1, 420)
    got = [model(piece, kv_cache=cache) for piece in ids.split([300, 100] + [1] * 20, dim=1)]
    close(torch.cat(got, dim=1), model(ids))


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_different_length(models: dict[str, GPT], name: str) -> None:
    """Ragged rows, fed token by token and in pieces of several, each equal to itself alone."""
    model = models[name]
    ids, lengths = random_ids(4, 23), [1, 6, 13, 16]
    cache = KVCache(model.config, 4, 24, num_rows=0)
    for row, length in enumerate(lengths):
        alone = KVCache(model.config, 1, 24)
        model(ids[row : row + 1, :length], kv_cache=alone)
        assert cache.join(alone) == row
    full = [model(ids[row : row + 1])[0] for row in range(4)]
    for step in (1, 1, 3, 1, 1):
        new = torch.stack([ids[row, n : n + step] for row, n in enumerate(lengths)])
        logits = model(new, kv_cache=cache)
        for row, n in enumerate(lengths):
            close(logits[row], full[row][n : n + step])
        lengths = [n + step for n in lengths]
    assert cache.lengths.tolist() == lengths == [cache.length(row) for row in range(4)]


@pytest.mark.parametrize("name", ["grouped", "later_windows"])
def test_rows_come_and_go_in_any_order(models: dict[str, GPT], name: str) -> None:
    """A long random run of joining, leaving and decoding; every row always equal to itself alone."""
    model, dice = models[name], random.Random(0)
    full = {seed: (ids := random_ids(1, 24, seed), model(ids)[0]) for seed in range(25)}
    cache, running, waiting = KVCache(model.config, 4, 24, num_rows=0), [], list(full)
    while waiting or running:
        if waiting and len(running) < 4 and dice.random() < 0.5:
            seed, length = waiting.pop(), dice.randint(1, 23)
            alone = KVCache(model.config, 1, dice.randint(length, 24))  # rings of another size
            model(full[seed][0][:, :length], kv_cache=alone)
            cache.join(alone)
            running.append([seed, length])
        if not running:
            continue
        logits = model(torch.stack([full[s][0][0, n : n + 1] for s, n in running]), kv_cache=cache)
        for row, (seed, length) in enumerate(running):
            close(logits[row, 0], full[seed][1][length])
            running[row][1] += 1
        for row in reversed(range(len(running))):
            if running[row][1] == 24 or dice.random() < 0.1:
                cache.leave(row)
                running[row] = running[-1]
                running.pop()
        assert cache.lengths.tolist() == [length for _, length in running]


def test_one_prefilled_row_expands_to_many(models: dict[str, GPT]) -> None:
    model = models["later_windows"]
    prompt, ends = random_ids(1, 15), random_ids(5, 4, seed=9)
    alone = KVCache(model.config, 1, 15)
    model(prompt, kv_cache=alone)
    many = KVCache(model.config, 5, 19)
    for row in range(5):
        many.copy_row_from(alone, 0, row)
    got = [model(ends[:, i : i + 1], kv_cache=many) for i in range(4)]
    close(torch.cat(got, dim=1), model(torch.cat([prompt.expand(5, -1), ends], dim=1))[:, 15:])


def test_a_cleared_cache_is_as_new(models: dict[str, GPT]) -> None:
    model, cache = models["later_windows"], KVCache(models["later_windows"].config, 2, 24)
    model(random_ids(2, 20), kv_cache=cache)
    cache.clear()
    ids = random_ids(2, 9, seed=5)
    close(torch.cat([model(ids[:, :4], kv_cache=cache), model(ids[:, 4:], kv_cache=cache)], dim=1), model(ids))


def test_bf16() -> None:
    model = make_model(CONFIGS["later_windows"], dtype=torch.bfloat16)
    ids = random_ids(2, 24)
    cache = KVCache(model.config, 2, 24, dtype=torch.bfloat16)
    got = torch.cat([model(piece, kv_cache=cache) for piece in ids.split([9] + [1] * 15, dim=1)], dim=1)
    exact = make_model(CONFIGS["later_windows"])(ids)
    error = (model(ids) - exact).abs().max()  # what bf16 costs without a cache
    assert (got - exact).abs().max() < 2 * error


# ---------------------------------------------------------------------------------------------------
# One layer


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Causal windowed attention of one row in float64, position by position. q (T, H, D); k, v (T, G, D)."""
    T, H, D = q.shape
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(T, H, D, dtype=torch.float64)
    for t in range(T):
        for h in range(H):
            g, lo = h // (H // k.size(1)), max(0, t - window)
            weights = (k[lo : t + 1, g] @ q[t, h] / D**0.5).softmax(0)
            out[t, h] = weights @ v[lo : t + 1, g]
    return out.float()


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1)])
def test_attention_against_float64(divisor: int, heads: tuple[int, int]) -> None:
    H, G = heads
    config = GPTConfig(sequence_len=20, n_layer=2, n_head=H, n_kv_head=G, n_embd=8 * H, window_pattern="SL")
    window = 20 // divisor
    generator = torch.Generator().manual_seed(divisor)
    q, k, v = (torch.randn(2, 20, n, 8, generator=generator) for n in (H, G, G))
    config.window_sizes = lambda: [(window, 0), (20, 0)]  # type: ignore[method-assign]
    cache = KVCache(config, 2, 20)
    got: list[list[torch.Tensor]] = [[], []]
    for part in torch.arange(20).split([3, 1, 6, 1, 1, 1, 7]):
        for layer, left in enumerate((window, 20)):
            got[layer].append(cache.attend(layer, q[:, part], k[:, part], v[:, part], left))
        cache.lengthen(len(part))
    for layer, left in enumerate((window, 20)):
        for row in range(2):
            close(torch.cat(got[layer], dim=1)[row], reference(q[row], k[row], v[row], left))


def test_a_ring_equals_a_full_cache_with_a_mask() -> None:
    config = GPTConfig(
        sequence_len=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL", short_window_divisor=2
    )
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 64, n, 8, generator=generator) for n in (4, 2, 2))
    full_k, full_v = torch.zeros(3, 64, 2, 8), torch.zeros(3, 64, 2, 8)
    ring = KVCache(config, 3, 64)
    assert ring.k[0].size(1) == 33
    for t in range(64):
        one = slice(t, t + 1)
        y = ring.attend(0, q[:, one], k[:, one], v[:, one], 32)
        expected = flash_attn_with_kvcache(
            q[:, one], full_k, full_v, k[:, one], v[:, one], torch.full((3,), t), window_size=(32, 0)
        )
        close(y, expected)
        ring.lengthen(1)


def test_windowed_layers_hold_only_their_window() -> None:
    config = GPTConfig(sequence_len=2048, n_layer=4, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SSSL")
    cache = KVCache(config, 2, 2048, dtype=torch.bfloat16)
    assert [k.size(1) for k in cache.k] == [1025, 1025, 1025, 2048]
    assert cache.num_bytes == 2 * 2 * (3 * 1025 + 2048) * 16 * 2
    assert [k.size(1) for k in KVCache(config, 1, 100).k] == [100] * 4


def test_more_than_fits_is_an_error_not_an_overwrite(models: dict[str, GPT]) -> None:
    model, cache = models["plain"], KVCache(models["plain"].config, 1, 5)
    model(random_ids(1, 5), kv_cache=cache)
    with pytest.raises(AssertionError, match="do not fit"):
        model(random_ids(1, 1), kv_cache=cache)
    with pytest.raises(AssertionError, match="no row is free"):
        cache.join(cache)
