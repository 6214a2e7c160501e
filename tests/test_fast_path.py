"""Fast paths give way, with one warning, when the code they stand for changes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_helpers import answers
from stubs import ByteTokenizer, stir

from nanochat import flash_attention, fp8, gpt, loss_head
from nanochat.common import UserError, fast_path
from nanochat.common.fast_path import fingerprint
from nanochat.cpu import functions, fused, kernels
from nanochat.engine import Engine
from nanochat.formats import same_network
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference import cpu_decoder, sampling
from nanochat.inference.cpu_decoder import CpuDecoder
from nanochat.optimizer import update_rules

needs_compiler = pytest.mark.skipif(kernels.library() is None, reason="no C compiler")
PLAIN = {
    name: next(getattr(m, name) for m in (gpt, flash_attention, loss_head, update_rules) if hasattr(m, name))
    for name in fused.FORMS
}


@pytest.fixture(autouse=True)
def no_warnings_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_path, "_warned", set())


@pytest.mark.parametrize("name", fused.FORMS)
def test_fingerprints_of_c_forms_are_recorded(name: str) -> None:
    """Failed? The plain form was edited. Make kernels.c compute the same and record the new fingerprint in
    cpu/fused.py, FORMS; or drop the C form, and `in_c` with it."""
    assert fused.FORMS[name].fingerprint == fingerprint(PLAIN[name]), f"now {fingerprint(PLAIN[name])}"


@pytest.mark.parametrize("name", cpu_decoder.FUNCTIONS)
def test_fingerprints_of_the_c_decoder_are_recorded(name: str) -> None:
    """Failed? A part of the model was edited. Make decode.c compute the same and record the new fingerprint in
    inference/cpu_decoder.py, FUNCTIONS; until then CPUs decode in PyTorch."""
    found = fast_path.changed({name: cpu_decoder.FUNCTIONS[name]}, gpt)
    assert not found, f"now {fingerprint(attrgetter(name)(gpt))}"


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, known in same_network.FUNCTIONS for name in known]
)
def test_fingerprints_of_exports_are_recorded(module: Any, name: str) -> None:
    """Failed? A part of the model was edited. Make the exports in nanochat/formats compute the same (remote_code,
    onnx_graph.py; `lacking` of hf_class.py for what the others cannot) and record the new fingerprint in
    same_network.py; until then nothing is exported."""
    assert fingerprint(attrgetter(name)(module)) == dict(same_network.FUNCTIONS)[module][name], (
        f"now {fingerprint(attrgetter(name)(module))}"
    )


def test_fields_of_the_c_decoder_are_fields_of_the_config() -> None:
    """A field that is not among them has its default in every model decoded in C."""
    names = {f.name for f in dataclasses.fields(GPTConfig)}
    assert set(cpu_decoder.FIELDS) <= names and set(same_network.FIELDS) <= names


@pytest.mark.parametrize("name", sampling.C_FUNCTIONS)
def test_fingerprints_of_the_c_draw_are_recorded(name: str) -> None:
    """Failed? Make sampling.c compute the same and record the new fingerprint in inference/sampling.py, C_FUNCTIONS."""
    found = fast_path.changed({name: sampling.C_FUNCTIONS[name]}, sampling)
    assert not found, f"now {fingerprint(attrgetter(name)(sampling))}"


def test_an_edited_distribution_is_drawn_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    last = torch.tensor([[0.0, 0.0, 1.0]])
    monkeypatch.setattr(sampling.SamplingParams, "distribution", lambda self, logits: (last, None))
    logits = torch.tensor([[9.0, 0.0, 0.0]])
    for _ in range(2):
        assert sampling.draw_tokens(logits, [sampling.SamplingParams()], [sampling.make_rng(1, 0)]) == [2]
    assert len(capsys.readouterr().err.splitlines()) == (kernels.library() is not None)


def test_the_fingerprint_of_fp8_is_recorded() -> None:
    """Failed? Linear.forward was edited. Record the new fingerprint in fp8.py, PLAIN_FORM, if torchao's layer still
    computes the same up to rounding."""
    assert fingerprint(gpt.Linear.forward) == fp8.PLAIN_FORM


# ---------------------------------------------------------------------------------------------------
# Fingerprints


def first(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


class Elsewhere:
    @staticmethod
    def second(x):  # the same, laid out in another way
        """A docstring."""
        return F.relu(
            x
        ).square()  # fmt: skip

    @staticmethod
    def third(x):
        return F.gelu(x).square()


def test_a_fingerprint_is_of_what_is_computed() -> None:
    def renamed(function: object) -> str:
        import ast

        return " ".join(fast_path._tokens(ast.parse(function).body[0]))  # type: ignore[call-overload]

    assert len(fingerprint(first)) == 8
    assert renamed("def f(x: int) -> int:\n  'words'\n  return x + 1") == renamed("def f(x):\n    return (x +  1)  # !")
    for other in ("x - 1", "x + 2", "y + 1", "x + 1.0", "x + (1, None)", "x[1]"):
        assert renamed(f"def f(x): return {other}") != renamed("def f(x): return x + 1")


def test_the_fingerprint_is_the_same_on_every_python() -> None:
    """Made from the syntax tree, whose form this pins; it would cost every fast path if it changed."""
    assert fingerprint(first) == "2502714a"


def test_what_has_no_source_has_no_fingerprint() -> None:
    assert fingerprint(functools.partial(first)) == fingerprint(len) == fingerprint(None) == ""


# ---------------------------------------------------------------------------------------------------
# C forms


@needs_compiler
@pytest.mark.parametrize("name", fused.FORMS)
def test_unchanged_functions_run_in_c(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form, calls = fused.FORMS[name], []
    if name in ("linear", "add_product_") and kernels.wide_product() is None:
        pytest.skip("no AMX, or PyTorch without MKL")
    if name == "block_attention" and not functions.tiles_usable():
        pytest.skip("no AMX")
    assert fused.agrees(form, PLAIN[name].plain)
    monkeypatch.setattr(functions, "call", lambda *args: calls.append(args[0]))
    monkeypatch.setattr(functions, "add_transposed_product", lambda *args, **named: calls.append("product"))
    if name == "linear":  # differs in its backward pass only
        x, weight = form.example()
        PLAIN[name](x, weight.requires_grad_()).sum().backward()
    else:
        with torch.no_grad():
            PLAIN[name](*form.example())
    assert len(calls) == 1


@needs_compiler
def test_an_edited_function_runs_as_edited(capsys: pytest.CaptureFixture[str]) -> None:
    @fused.in_c("relu_squared")
    def relu_squared(h: torch.Tensor) -> torch.Tensor:
        return F.gelu(h)

    h = torch.linspace(-1, 1, 9)
    for _ in range(2):
        torch.testing.assert_close(relu_squared(h.clone()), F.gelu(h))
    (line,) = capsys.readouterr().err.splitlines()
    assert "relu_squared" in line and "fast_path.py" in line


@needs_compiler
def test_a_kernel_that_computes_something_else_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a bad compiler would build it, or when a function that the plain form calls was changed."""
    monkeypatch.setattr(gpt, "norm", lambda x: F.layer_norm(x, (x.size(-1),)))
    fused.agrees.cache_clear()
    x, cos, sin, scale = fused.FORMS["normed_rotary"].example()
    wanted = gpt.normed_rotary.plain(x, cos, sin, scale)  # type: ignore[attr-defined]
    try:
        assert torch.equal(gpt.normed_rotary(x, cos, sin, scale), wanted)
    finally:
        fused.agrees.cache_clear()
    (line,) = capsys.readouterr().err.splitlines()
    assert "normed_rotary" in line


# ---------------------------------------------------------------------------------------------------
# The C decoder


def small(dtype: torch.dtype = torch.float32, **fields: Any) -> GPT:
    sizes: dict[str, Any] = {"n_layer": 3, "n_head": 2, "n_kv_head": 1, "n_embd": 64}
    return stir(
        GPT.create(GPTConfig.later(sequence_len=64, vocab_size=265, **sizes, **fields), compute_dtype=dtype), 0.2
    )


def decoded_in_c(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every step of the C decoder that is not of its own check."""
    calls: list[int] = []
    run = CpuDecoder._run

    def counted(self: CpuDecoder, *args: Any) -> torch.Tensor:
        if self.vocab_size != 64:
            calls.append(1)
        return run(self, *args)

    monkeypatch.setattr(CpuDecoder, "_run", counted)
    return calls


def greedy(model: GPT, prompt: list[int], count: int) -> list[int]:
    """The most likely continuation, by whole forward passes."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def gelu_mlp(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    monkeypatch.setattr(gpt.MLP, "forward", lambda self, x: self.c_proj(F.gelu(self.c_fc(x))))


def layer_norm(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    monkeypatch.setattr(gpt, "norm", lambda x: F.layer_norm(x, (x.size(-1),)))


def half_residual(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    def forward(self: gpt.Block, x: torch.Tensor, *args: Any) -> torch.Tensor:
        x = 0.5 * x + self.attn(gpt.norm(x), *args)
        return 0.5 * x + self.mlp(gpt.norm(x))

    monkeypatch.setattr(gpt.Block, "forward", forward)


def unknown_field(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    """As if qk_scale were new to the decoder."""
    monkeypatch.setattr(cpu_decoder, "FIELDS", [name for name in cpu_decoder.FIELDS if name != "qk_scale"])
    model.config.qk_scale = 3.0


def subclass(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    class Doubled(gpt.MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    for block in model.blocks:
        block.mlp.__class__ = Doubled


def one_instance(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    mlp = model.blocks[1].mlp
    mlp.forward = lambda x: 2 * gpt.MLP.forward(mlp, x)


def inherited_method(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    """nn.Embedding's forward, which gpt.Embedding does not define itself."""
    wte = model.wte
    wte.forward = lambda idx: F.embedding(idx, wte.weight) * torch.linspace(-1, 1, 64)


def hook(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    model.blocks[1].register_forward_hook(lambda module, args, out: out * 0.5)


def narrow_mlp(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    mlp = model.blocks[0].mlp
    mlp.c_fc, mlp.c_proj = gpt.Linear(64, 96), gpt.Linear(96, 64)
    for parameter in mlp.parameters():
        torch.nn.init.zeros_(parameter)
    stir(mlp, 0.2)


def gain(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    model.blocks[0].gain = torch.nn.Parameter(torch.full((64,), 0.5))
    model.blocks[0].register_forward_pre_hook(lambda block, args: (args[0] * block.gain.to(args[0].dtype), *args[1:]))


CHANGES = [
    gelu_mlp,
    layer_norm,
    half_residual,
    unknown_field,
    subclass,
    one_instance,
    inherited_method,
    hook,
    narrow_mlp,
    gain,
]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_generates_what_it_computes(
    change: Callable[..., None],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls, prompt, model = decoded_in_c(monkeypatch), [5, 6, 7, 8], small(dtype)
    before = greedy(model, prompt, 12)
    change(monkeypatch, model)
    wanted = greedy(model, prompt, 12)
    assert wanted != before, "the change must show"
    for _ in range(2):
        (found,) = answers(Engine(model, ByteTokenizer()), [prompt], max_tokens=12, temperature=0)
    assert not calls
    # In bfloat16, sums in another order may decide between two almost equal tokens later on.
    same = len(found) if dtype == torch.float32 else 4
    assert len(found) >= 4 and found[:same] == wanted[:same]
    lines = capsys.readouterr().err.splitlines()
    assert sum("C decoder" in line for line in lines) == 1 and not any("kv_cache.py" in line for line in lines)


def shifted_mlp(self: gpt.MLP, x: torch.Tensor) -> torch.Tensor:
    """Mixes each token with the one before, and keeps nothing in the cache."""
    return self.c_proj(F.relu(self.c_fc(x + F.pad(x, (0, 0, 1, 0))[:, :-1])))


def test_a_changed_model_that_cannot_be_decoded_token_by_token_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpt.MLP, "forward", shifted_mlp)
    for _ in range(2):
        Engine(small(), ByteTokenizer())
    assert sum("kv_cache.py" in line for line in capsys.readouterr().err.splitlines()) == 1


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unchanged_model_is_decoded_in_c(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, model = decoded_in_c(monkeypatch), small(dtype)
    answers(Engine(model, ByteTokenizer()), [[5, 6, 7, 8]], max_tokens=12, temperature=0)
    assert calls and not capsys.readouterr().err


@pytest.mark.parametrize("dtype, n_embd", [(torch.float16, 32), (torch.float32, 40)])
def test_dtypes_and_sizes_without_c_code_never_reach_the_decoder(
    dtype: torch.dtype, n_embd: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even to compare an example: C would read past the end of a head."""
    monkeypatch.setattr(cpu_decoder, "_agrees", {})
    monkeypatch.setattr(cpu_decoder, "CpuDecoder", None)
    config = GPTConfig(sequence_len=32, vocab_size=265, n_layer=2, n_head=2, n_kv_head=1, n_embd=n_embd)
    Engine(GPT.create(config, compute_dtype=dtype), ByteTokenizer())
    assert not capsys.readouterr().err


@needs_compiler
def test_a_wrong_result_of_the_decoder_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A change that no fingerprint covers: in the model only a small example shows it."""
    monkeypatch.setattr(cpu_decoder, "_agrees", {})
    monkeypatch.setattr(cpu_decoder, "EPSILON", 0.1)
    assert not cpu_decoder.supported(small()) and not cpu_decoder.supported(small())
    assert len(capsys.readouterr().err.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------
# Exports


def renamed(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    """relu_squared gone from gpt.py, as after a change to another function."""
    monkeypatch.delattr(gpt, "relu_squared")


def other_windows(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    monkeypatch.setattr(GPTConfig, "window_sizes", lambda self: [(7, 0)] * self.n_layer)


def another_block(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    """With a bias: a parameter that no export has a name for."""

    class Biased(gpt.Block):
        def __init__(self, config: GPTConfig, layer: int) -> None:
            super().__init__(config, layer)
            self.bias = torch.nn.Parameter(torch.zeros(config.n_embd))

    monkeypatch.setattr(gpt, "Block", Biased)


@pytest.mark.parametrize("change", [gelu_mlp, layer_norm, half_residual, renamed, other_windows, another_block])
def test_a_changed_network_is_not_exported(change: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPTConfig.later(sequence_len=32, vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
    same_network.check_network(config)
    change(monkeypatch, None)
    with pytest.raises(UserError, match="same_network"):
        same_network.check_network(config)
