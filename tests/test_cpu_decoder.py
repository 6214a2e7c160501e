"""The decode step in C against the model's own forward pass, with and without a cache, alone and beside others."""

import contextlib
import platform
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import answers, sequence
from stubs import ByteTokenizer

from nanochat.common import UserError
from nanochat.cpu import kernels
from nanochat.device.cpu import cpu_flags
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference import cpu_decoder
from nanochat.inference.cpu_decoder import CpuDecoder
from nanochat.inference.decoding import RunningBatch
from nanochat.inference.decoding_weights import DecodingWeights
from nanochat.inference.kv_cache import KVCache
from nanochat.inference.packed_weights import PackedWeights, block_outputs, matrices, pack, quantize
from nanochat.inference.tools import ToolTable
from nanochat.optim import MuonAdamW
from nanochat.optimizer.param_groups import OptimizerConfig, build_param_groups

SIZES: dict[str, Any] = {
    "sequence_len": 48,
    "vocab_size": 301,
    "n_layer": 4,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 64,
    "window_pattern": "SL",
    "short_window_divisor": 2,
}
FORMS: dict[str, Callable[..., GPTConfig]] = {
    "published": GPTConfig,
    "later": GPTConfig.later,
    "plain": GPTConfig.plain,
    "ngrams": partial(GPTConfig.later, ngram_rows=97, ngram_dim=24),
}


def build(form: str = "later", dtype: torch.dtype = torch.float32, **sizes: Any) -> GPT:
    """A model none of whose parameters is zero, so that every feature shows."""
    model = GPT.create(FORMS[form](**{**SIZES, **sizes}), compute_dtype=dtype)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * (0.15 if p.dim() > 1 else 0.5))
    return model


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def prefilled(model: GPT, prompts: list[torch.Tensor], max_tokens: int = 48) -> KVCache:
    """A cache whose rows hold prompts of several lengths."""
    cache = KVCache(model.config, len(prompts), max_tokens, dtype=model.compute_dtype, num_rows=0)
    for prompt in prompts:
        one = KVCache(model.config, 1, max_tokens, dtype=model.compute_dtype)
        with torch.inference_mode():
            model(prompt[None], kv_cache=one)
        cache.join(one)
    return cache


needs_compiler = pytest.mark.skipif(not cpu_decoder.supported(build()), reason="no C compiler")


@contextlib.contextmanager
def compiled_with(folder: Path, *flags: str) -> Iterator[None]:
    """Inside, the kernels are those that the compiler makes with these flags too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "FLAGS", (*kernels.FLAGS, *flags))
        patch.setenv("NANOCHAT_KERNELS_DIR", str(folder))
        kernels.library.cache_clear()
        try:
            yield
        finally:
            kernels.library.cache_clear()


COMPILED = {
    "native": (),
    "znver3": ("-mtune=znver3",),  # gcc takes some of the multiply-adds apart there if it may choose
    "amx": ("-march=x86-64", "-O1", "-Wno-psabi", "-include", str(Path(__file__).with_name("emulated.h"))),
}


@pytest.fixture(params=COMPILED)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """As built here, and as for other CPUs: whose tuning is another, and with AVX512-BF16 and AMX."""
    if request.param == "native":
        yield request.param
    elif platform.machine() != "x86_64":
        pytest.skip("an x86 CPU")
    else:
        folder = tmp_path_factory.getbasetemp() / f"kernels-{request.param}"  # compiled once
        with compiled_with(folder, *COMPILED[request.param]):
            assert block_outputs() == 16 or request.param != "amx"
            yield request.param


@needs_compiler
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80])
@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_the_model_without_a_cache(form: str, head_dim: int) -> None:
    model = build(form, n_embd=4 * head_dim)
    tokens = ids(40)
    cache = prefilled(model, [tokens[:3]])
    decoder = CpuDecoder(model, cache, PackedWeights(model))
    with torch.inference_mode():
        whole = model(tokens[None])[0]  # (T, V)
    for at in range(3, 40):  # the short rings of 25 slots go round
        logits = decoder([int(tokens[at])])
        torch.testing.assert_close(logits[0], whole[at], rtol=1e-4, atol=5e-5)
    assert cache.length(0) == 40


@needs_compiler
@pytest.mark.parametrize("head_dim", [16, 80])
def test_bfloat16_stays_as_near_to_float32_as_pytorch_does(head_dim: int, compiled: str) -> None:
    sizes = {"n_head": 5, "n_kv_head": 1, "n_embd": 5 * head_dim}  # 80 inputs are no whole number of tiles
    exact, model = build(**sizes), DecodingWeights(build(dtype=torch.bfloat16, **sizes)).current()
    tokens = ids(30)
    cache, other = prefilled(model, [tokens[:5]]), prefilled(model, [tokens[:5]])
    decoder = CpuDecoder(model, cache, PackedWeights(model))
    ours, theirs = [], []
    with torch.inference_mode():
        whole = exact(tokens[None])[0]
        for at in range(5, 30):
            ours.append((decoder([int(tokens[at])])[0] - whole[at]).square().mean())
            theirs.append((model(tokens[None, at : at + 1], kv_cache=other)[0, 0] - whole[at]).square().mean())
    assert torch.stack(ours).mean() < 1.1 * torch.stack(theirs).mean() < 0.01


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("heads", [4, 5])  # 64 inputs fill AMX's tiles, 80 do not
def test_a_row_gets_the_same_bits_alone_and_beside_others(
    dtype: torch.dtype, int8: bool, heads: int, compiled: str
) -> None:
    weights = DecodingWeights(build(dtype=dtype, n_head=heads, n_kv_head=1, n_embd=16 * heads), int8)
    model = weights.current()
    prompts = [ids(2 + i, seed=i) for i in range(19)]  # rows of 2 .. 20 tokens: 4 at a time, then 3 alone; tiles of 10
    together = CpuDecoder(model, prefilled(model, prompts), weights.packed)
    alone = [CpuDecoder(model, prefilled(model, [prompt]), weights.packed) for prompt in prompts]
    for step in range(20):
        tokens = ids(19, seed=100 + step).tolist()
        logits = together(tokens)
        for row, decoder in enumerate(alone):
            assert torch.equal(logits[row], decoder([tokens[row]])[0]), f"row {row} at step {step}"


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
def test_a_short_prompt_is_what_its_tokens_are_one_by_one(dtype: torch.dtype, int8: bool, compiled: str) -> None:
    weights = DecodingWeights(build(dtype=dtype), int8)
    model, tokens = weights.current(), ids(24).tolist()
    assert weights.packed is not None
    one_by_one = CpuDecoder(model, KVCache(model.config, 1, 48, dtype=dtype), weights.packed)
    logits = [one_by_one([token]) for token in tokens]
    for cuts in ([24], [1, 23], [7, 9, 8], [20, 2, 2]):
        decoder = CpuDecoder(model, KVCache(model.config, 1, 48, dtype=dtype), weights.packed)
        at = 0
        for length in cuts:
            assert decoder.takes(at, length)
            given = decoder.prompt(tokens[at : at + length])
            at += length
            assert torch.equal(given, logits[at - 1]), f"{cuts} after {at} tokens"
        assert all(torch.equal(a, b) for a, b in zip(decoder.cache.k, one_by_one.cache.k))
        after = decoder([5])
    assert torch.equal(after, one_by_one([5]))


@needs_compiler
def test_a_prompt_that_closes_a_window_is_not_taken() -> None:
    model = build()
    decoder = CpuDecoder(model, KVCache(model.config, 1, 48), PackedWeights(model))
    ring = min(ring.size(1) for ring in decoder.cache.k)
    assert ring < 48 and decoder.takes(0, ring) and decoder.takes(7, ring - 7)
    assert not decoder.takes(0, ring + 1) and not decoder.takes(7, ring - 6)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
def test_the_longest_prompt_that_is_taken(dtype: torch.dtype, int8: bool) -> None:
    weights = DecodingWeights(build(dtype=dtype, sequence_len=300, window_pattern="L"), int8)
    model, length = weights.current(), cpu_decoder.short_prompt(dtype, int8)
    assert weights.packed is not None
    decoder = CpuDecoder(model, KVCache(model.config, 1, 300, dtype=dtype), weights.packed)
    assert decoder.takes(0, length) and not decoder.takes(0, length + 1)
    tokens = ids(length)
    with torch.inference_mode():
        last = model(tokens[None])[0, -1]
    error = (decoder.prompt(tokens.tolist())[0] - last).abs().max()
    assert error < (0.3 if dtype == torch.bfloat16 else 2e-3 if int8 else 1e-4)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_no_bit(threads: int, compiled: str) -> None:
    model, prompts = build(vocab_size=1100), [ids(3 + i, seed=i) for i in range(13)]  # 69 blocks of outputs
    before, results = torch.get_num_threads(), []
    caches = [prefilled(model, prompts) for _ in range(2)]  # by PyTorch, which makes no such promise
    for number, cache in zip((2, threads), caches):
        torch.set_num_threads(number)
        try:
            results.append(CpuDecoder(model, cache, PackedWeights(model))(ids(13).tolist()))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*results)


@needs_compiler
def test_the_batch_uses_it_and_says_what_plain_pytorch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ByteTokenizer()
    model = build()
    prompts = [list(range(40 + i, 45 + 2 * i)) for i in range(5)]
    engine = Engine(model, tokenizer)
    ours = answers(engine, prompts, max_tokens=20, temperature=1.0, top_k=20, seed=3, batch_size=3)
    calls = []
    monkeypatch.setattr(CpuDecoder, "__call__", lambda *_: calls.append(1))
    monkeypatch.setattr(cpu_decoder, "supported", lambda *_: False)
    theirs = answers(engine, prompts, max_tokens=20, temperature=1.0, top_k=20, seed=3, batch_size=3)
    assert ours == theirs and not calls and any(len(tokens) == 20 for tokens in ours)


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the names of other CPUs are those of x86")
@pytest.mark.parametrize("cpu", ["haswell", "x86-64"])  # vectors of 8 and of 4 floats
def test_agrees_on_cpus_with_shorter_vectors(cpu: str, tmp_path: Path) -> None:
    if cpu == "haswell" and not {"avx2", "fma", "bmi2"} <= cpu_flags():
        pytest.skip("this CPU has no AVX2")
    quicker = () if cpu == "haswell" else ("-O1",)  # haswell as users compile it; this takes less than half the time
    with compiled_with(tmp_path, f"-march={cpu}", *quicker):
        assert block_outputs() < 16
        for dtype, int8 in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
            weights = DecodingWeights(build(dtype=dtype), int8)
            model, tokens = weights.current(), ids(9, 12, seed=2)
            assert weights.packed is not None
            with torch.inference_mode():
                whole = model(tokens)  # (9, T, V)
            alone = CpuDecoder(model, KVCache(model.config, 1, 48, dtype=dtype), weights.packed)
            together = CpuDecoder(model, prefilled(model, list(tokens[:, :11])), weights.packed)
            tolerance = 0.3 if dtype == torch.bfloat16 else 2e-3 if int8 else 1e-4
            assert (alone.prompt(tokens[0].tolist()) - whole[0, 11]).abs().max() < tolerance
            assert (together(tokens[:, 11].tolist()) - whole[:, 11]).abs().max() < tolerance


def test_what_it_is_not_written_for_goes_through_the_model() -> None:
    model = build(n_head=8, n_kv_head=8)  # heads of 8
    assert not cpu_decoder.supported(model)
    row = sequence([1, 2, 3], 4)
    batch = RunningBatch(DecodingWeights(model), ToolTable(ByteTokenizer()), set(), 2, 20)
    batch.submit([row])
    while not batch.idle:
        batch.step()
    assert len(row.tokens) == 4


# ---------------------------------------------------------------------------------------------------
# int8


def test_quantize_keeps_every_weight_within_half_a_step() -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 40)[:, None]
    weight[7] = 0
    values, scale = quantize(weight)
    assert values.dtype == torch.int8 and values.abs().max() == 127 and not values[7].any()
    assert ((values * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()


def entry(packed: torch.Tensor, m: int, k: int) -> float:
    """Weight (m, k) of a packed matrix, found by counting: what decode.c reads for output m and input k."""
    outputs, together = packed.shape[2:]
    flat = packed.flatten().tolist()
    blocks_before, inputs_before = m // outputs * packed.size(1), k // together
    return flat[((blocks_before + inputs_before) * outputs + m % outputs) * together + k % together]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_packing_puts_every_weight_where_c_looks_for_it(dtype: torch.dtype) -> None:
    weight = torch.arange(21 * 32).view(21, 32).remainder(127).to(dtype)  # 21 outputs: the second block is not full
    packed = pack(weight)
    filled = packed.numel() // 32
    assert packed.is_contiguous() and 21 <= filled <= 32
    assert all(entry(packed, m, k) == weight[m, k] for m in range(21) for k in range(32))
    assert all(entry(packed, m, k) == 0 for m in range(21, filled) for k in range(32))


def unpacked(weights: DecodingWeights, linear: torch.nn.Linear) -> torch.Tensor:
    """The matrix that int8 weights stand for."""
    assert weights.packed is not None
    values, scale = weights.packed.of(linear)
    assert scale is not None
    whole = values.permute(0, 2, 1, 3).reshape(len(scale), -1) * scale[:, None]
    return whole[: linear.out_features]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_decodes_what_prompts_are_read_with(dtype: torch.dtype) -> None:
    model = build(dtype=dtype)
    before = model.blocks[0].mlp.c_fc.weight.clone()
    weights = DecodingWeights(model, int8=True)
    copy = weights.current()
    assert torch.equal(model.blocks[0].mlp.c_fc.weight, before), "the model itself is untouched"
    for linear in matrices(copy):
        torch.testing.assert_close(linear.weight.float(), unpacked(weights, linear), rtol=5e-3, atol=1e-6)
    if not cpu_decoder.supported(copy):
        return
    tokens = ids(20)
    assert weights.packed is not None
    decoder = CpuDecoder(copy, prefilled(copy, [tokens[:4]]), weights.packed)
    with torch.inference_mode():
        whole = copy(tokens[None])[0]
    for at in range(4, 20):
        error = (decoder([int(tokens[at])])[0] - whole[at]).abs().max()
        assert error < (2e-3 if dtype == torch.float32 else 0.3)


@needs_compiler
@pytest.mark.parametrize("heads", [4, 5])
@pytest.mark.parametrize("outlier", [1, 10])  # squared afterwards; weights that undo 100 are 1 of 127 in int8
def test_int8_rounds_what_it_multiplies_far_less_than_bfloat16_does(heads: int, outlier: float, compiled: str) -> None:
    model = build(n_head=heads, n_kv_head=1, n_embd=16 * heads)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.c_fc.weight[7] *= outlier
            block.mlp.c_proj.weight[:, 7] /= outlier**2
    weights = DecodingWeights(model, int8=True)
    exact, tokens = weights.current(), ids(24)
    assert weights.packed is not None
    rounded = DecodingWeights(GPT.create(exact.config, compute_dtype=torch.bfloat16))
    rounded.current().load_state_dict(exact.state_dict())
    with torch.inference_mode():
        whole, in_bfloat16 = exact(tokens[None])[0, -1], rounded.current()(tokens[None])[0, -1]
    logits = CpuDecoder(exact, KVCache(exact.config, 1, 48), weights.packed).prompt(tokens.tolist())[0]
    assert (logits - whole).norm() < 0.1 * (in_bfloat16 - whole).norm() < 0.01 * whole.norm()


@needs_compiler
def test_damaged_activations_show_in_int8() -> None:
    model = build()
    with torch.no_grad():
        model.wte.weight[3, 5] = float("nan")
    weights = DecodingWeights(model, int8=True)
    assert weights.packed is not None
    decoder = CpuDecoder(weights.current(), KVCache(model.config, 1, 48), weights.packed)
    assert decoder([2]).isfinite().all() and decoder([3]).isnan().all()


@needs_compiler
def test_int8_is_compared_with_the_plain_form_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_decoder, "_agrees", {})
    assert DecodingWeights(model := build(), int8=True).packed is not None
    assert list(cpu_decoder._agrees) == [(str(cpu_decoder.probe_config(model.config)), torch.float32, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_adamw_alone_is_followed(dtype: torch.dtype) -> None:
    model = build(dtype=dtype)
    weights = DecodingWeights(model)
    groups = build_param_groups(model, OptimizerConfig(), ns_dtype=torch.float32)
    optimizer = MuonAdamW([group for group in groups if group["kind"] == "adamw"])
    tokens = ids(1, 6)
    before = weights.current()(tokens)
    model(tokens, tokens).backward()
    optimizer.step()
    assert torch.equal(weights.current()(tokens), model(tokens)) and not torch.equal(before, model(tokens))
    if weights.packed:
        head = weights.current().lm_head
        assert entry(weights.packed.of(head)[0], 5, 7) == head.weight[5, 7]


def test_other_weights_put_in_are_followed() -> None:
    model = build()
    weights = DecodingWeights(model)
    with torch.no_grad():
        state = {name: p * 2 for name, p in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert torch.equal(weights.current().lm_head.weight, model.lm_head.weight)
    if weights.packed:
        assert entry(weights.packed.of(model.lm_head)[0], 5, 7) == model.lm_head.weight[5, 7]


def test_copies_made_in_inference_mode_are_renewed_outside_of_it() -> None:
    model = build(dtype=torch.bfloat16)
    with torch.inference_mode():
        weights = DecodingWeights(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    assert torch.equal(weights.current().lm_head.weight, model.lm_head.weight.bfloat16())


@needs_compiler
@pytest.mark.parametrize("name", ["mlp.c_fc", "mlp.c_proj", "attn.c_v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_damaged_weight_shows(name: str, dtype: torch.dtype) -> None:
    model = build(dtype=dtype)
    with torch.no_grad():
        model.blocks[0].get_submodule(name).weight[3] = float("nan")  # type: ignore[index, operator]
    engine = Engine(model, ByteTokenizer())
    with pytest.raises(FloatingPointError, match="damaged"):
        answers(engine, [[1, 2, 3]], max_tokens=4)


@pytest.mark.parametrize("int8", [False, True])
def test_the_copies_follow_a_model_that_is_trained_on(int8: bool) -> None:
    model = build()
    weights = DecodingWeights(model, int8)
    first = weights.current().lm_head.weight.clone()
    packed = weights.packed
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    torch.testing.assert_close(weights.current().lm_head.weight, 3 * first)
    assert weights.packed is packed
    if int8:
        torch.testing.assert_close(unpacked(weights, weights.current().lm_head), 3 * first)
    elif packed is not None:
        assert entry(packed.of(model.lm_head)[0], 5, 7) == 3 * first[5, 7]


def test_int8_is_for_cpus() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(**SIZES))
    with pytest.raises(UserError, match="CPU"):
        DecodingWeights(model, int8=True)


def test_the_example_is_small_whatever_the_model_has() -> None:
    config = cpu_decoder.probe_config(GPTConfig.later(n_embd=768, n_head=6, n_kv_head=2, ngram_rows=2**26))
    assert GPT.allocate(config, "meta", torch.float32).num_scaling_params()["total"] < 4e6


@needs_compiler
@pytest.mark.parametrize("int8", [False, True])
def test_buffers_need_no_first_value(int8: bool) -> None:
    model = build()
    weights = DecodingWeights(model, int8)
    cache = KVCache(model.config, 3, 20, dtype=model.compute_dtype)
    torch.use_deterministic_algorithms(True)  # torch.empty then fills with NaN
    try:
        decoder = weights.cpu_decoder(cache)
    finally:
        torch.use_deterministic_algorithms(False)
    assert decoder is not None and all(decoder(tokens).isfinite().all() for tokens in ([1, 2, 3], [4, 5, 6]))
