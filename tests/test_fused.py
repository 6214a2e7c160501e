"""The C kernels compute what the plain form does, forward and backward, and are left out where they do not apply."""

import ctypes
import functools
import math
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from nanochat import flash_attention, gpt
from nanochat.cpu import functions, kernels
from nanochat.flash_attention import block_softmax_, block_softmax_backward_
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_head import head_loss, head_rows_

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")
T, H, D = 7, 3, 10


def rotation() -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.randn(1, T, 1, D // 2, generator=torch.Generator().manual_seed(3))
    return angles.cos(), angles.sin()


def normed_rotary(x: torch.Tensor) -> torch.Tensor:
    cos, sin = rotation()
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    return gpt.normed_rotary(x, cos.to(dtype), sin.to(dtype), 1.2)


STEPS = {
    "norm": (gpt.norm, [(5, 33)]),
    "mix": (gpt.mix, [(3, 5000), (3, 5000), (), ()]),
    "relu_squared": (lambda h: gpt.relu_squared(h + 0), [(3, 4097)]),
    "normed_rotary": (normed_rotary, [(2, T, H, D)]),
}


def differentiated(step, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The result and the gradient of each input, for a fixed random gradient of the result."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    result = step(*inputs)
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    result.backward(grad.to(result.dtype))
    return [result.detach(), *(x.grad for x in inputs)]  # type: ignore[list-item]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STEPS)
def test_c_form_agrees_with_float64(name: str, dtype: torch.dtype) -> None:
    step, shapes = STEPS[name]
    random = torch.Generator().manual_seed(1)
    inputs = [torch.randn(shape, generator=random).to(dtype if shape else torch.float32) for shape in shapes]
    assert kernels.usable(inputs[0]) and not kernels.usable(inputs[0].double())
    got = differentiated(step, inputs)
    wanted = differentiated(step, [x.double() for x in inputs])
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for ours, exact in zip(got, wanted, strict=True):
        assert ours.dtype == (dtype if ours.dim() else torch.float32)
        assert (ours.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(40,), (2, 3, 7), (0, 5)])
def test_linear_layers_sum_the_weights_gradient_in_float32(dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(*rows, 33, generator=random).to(dtype)
    weight = torch.randn(17, 33, generator=random)
    got = differentiated(gpt.linear, [x, weight])
    wanted = differentiated(gpt.linear, [x.double(), weight.to(dtype).double()])
    tolerances = (2e-5,) * 3 if dtype == torch.float32 else (5e-3, 5e-3, 5e-3)
    if dtype == torch.bfloat16 and kernels.wide_product() is not None:
        tolerances = (5e-3, 5e-3, 2e-3)  # what rounding the result's gradient costs
    for ours, exact, kind, tolerance in zip(got, wanted, (dtype, dtype, torch.float32), tolerances, strict=True):
        assert ours.dtype == kind and (ours.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_has_pytorchs_epsilon(dtype: torch.dtype) -> None:
    x = torch.full((2, 8), 1e-3, dtype=dtype)
    assert torch.allclose(gpt.norm(x), torch.nn.functional.rms_norm(x, (8,)), rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("first", "window"), [(0, 100), (6, 100), (6, 2), (6, 0)])
def test_block_softmax(first: int, window: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(1)
    N, Q, K = 3, 5, first + 5
    scores = (4 * torch.randn(N, Q, K, generator=random)).to(dtype)
    grad = torch.randn(N, Q, K, generator=random).to(dtype)
    exact = scores.double().requires_grad_()
    visible = torch.tensor([[max(0, first + i - window) <= j <= first + i for j in range(K)] for i in range(Q)])
    wanted = torch.softmax((exact * 0.3).masked_fill(~visible, -math.inf), dim=-1)
    wanted.backward(grad.double())
    weights = block_softmax_(scores.clone(), first, window, 0.3)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert torch.allclose(weights.double(), wanted, atol=tolerance)
    assert (weights[:, ~visible] == 0).all()
    back = block_softmax_backward_(grad.clone(), weights, 0.3)
    assert exact.grad is not None and torch.allclose(back.double(), exact.grad, atol=2 * tolerance)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """attention.c as compiled for a CPU with AMX, whose instructions are functions in plain C."""
    if platform.machine() != "x86_64":
        pytest.skip("an x86 CPU")
    path = tmp_path_factory.mktemp("emulated") / "attention.so"
    (source,) = (source for source in kernels.SOURCES if source.name == "attention.c")
    flags = ["-march=x86-64", "-O1", "-Wno-psabi", "-include", Path(__file__).with_name("emulated.h")]
    subprocess.run(["cc", *kernels.FLAGS, *flags, "-o", path, source, "-lm"], check=True)
    return ctypes.CDLL(str(path))


@needs_compiler
@pytest.mark.parametrize("T, D, window", [(32, 32, 32), (160, 64, 64), (96, 32, 96), (128, 32, 32)])
@pytest.mark.parametrize("cpu", ["this", "emulated"])
def test_attention_with_amx(
    cpu: str, T: int, D: int, window: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cpu == "this" and not functions.tiles_usable():
        pytest.skip("no AMX")
    if cpu == "emulated":
        library = request.getfixturevalue("emulated")
        assert library.tiles_usable() == 1
        monkeypatch.setattr(kernels, "library", lambda: library)
    random = torch.Generator().manual_seed(1)
    q, k, v, grad = (torch.randn(3, T, D, generator=random).bfloat16() for _ in range(4))
    ours, exact = ([x.to(dtype).requires_grad_() for x in (q, k, v)] for dtype in (torch.bfloat16, torch.float64))
    distance = torch.arange(T)[:, None] - torch.arange(T)
    scores = (exact[0] @ exact[1].mT / D**0.5).masked_fill((distance < 0) | (distance > window), -math.inf)
    wanted, got = scores.softmax(-1) @ exact[2], functions.block_attention(*ours, window)
    both = [
        (got, wanted),
        *zip(torch.autograd.grad(got, ours, grad), torch.autograd.grad(wanted, exact, grad.double())),
    ]
    for found, right in both:
        assert found.dtype == torch.bfloat16 and (found.double() - right).norm() < 5e-3 * right.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 60.0])  # the second drives most logits into the softcap
def test_head_rows(dtype: torch.dtype, scale: float) -> None:
    random = torch.Generator().manual_seed(1)
    logits = (scale * torch.randn(9, 301, generator=random)).to(dtype)
    targets, weights = torch.randint(301, (9,), generator=random), torch.rand(9, generator=random)
    exact = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(15 * torch.tanh(exact / 15), targets, reduction="none")
    (losses * weights).sum().backward()
    got, grad = head_rows_(logits.clone(), targets, weights, 15.0, True)
    assert torch.allclose(got.double(), losses, rtol=1e-5, atol=1e-5)
    assert exact.grad is not None
    assert (grad.double() - exact.grad).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * exact.grad.norm()
    only, _ = head_rows_(logits.clone(), targets, weights, 15.0, False)
    assert torch.equal(only, got)
    whole, _ = head_rows_(logits.clone(), targets, weights, 15, True)
    assert torch.equal(whole, got), "a softcap may be an int"


@needs_compiler
def test_nan_is_not_lost() -> None:
    """A broken weight must reach the loss, where the trainer looks for it."""
    for step, shapes in STEPS.values():
        inputs = [torch.ones(shape) for shape in shapes]
        inputs[0].view(-1)[3] = math.nan
        assert step(*inputs).isnan().any()
    x = torch.ones(4, 8)
    x[1, 2] = math.nan
    total, losses = head_loss(x, torch.ones(20, 8), torch.zeros(4, dtype=torch.long), None, 15.0)
    assert total.isnan() and losses.isnan().tolist() == [False, True, False, False]
    weights = block_softmax_(torch.full((1, 2, 2), math.nan), 0, 2, 1.0)
    assert weights[0, 1].isnan().all()


def test_without_a_compiler_all_works_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = GPTConfig.later(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
    tokens = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(1))
    losses = [GPT.create(config, seed=1).loss(tokens[:, :-1], tokens[:, 1:])[0]]
    monkeypatch.setenv("NANOCHAT_KERNELS_DIR", str(tmp_path))
    monkeypatch.setattr(kernels, "library", functools.cache(kernels.library.__wrapped__))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    losses.append(GPT.create(config, seed=1).loss(tokens[:, :-1], tokens[:, 1:])[0])
    assert torch.allclose(losses[0], losses[1], rtol=1e-5)
    assert capsys.readouterr().err.count("no C compiler") == 1


@needs_compiler
def test_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOCHAT_KERNELS_DIR")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(kernels, "FLAGS", (*kernels.FLAGS, "-O0"))  # compiles in a seventh of the time
    library = kernels.library.__wrapped__
    assert library() is not None
    (built,) = (tmp_path / "kernels").iterdir()
    before = built.stat().st_mtime_ns
    assert library() is not None and built.stat().st_mtime_ns == before


@pytest.mark.filterwarnings("ignore")  # of the tracer about itself
def test_tracing_sees_the_plain_form() -> None:
    """torch.compile and fake tensors have no memory that C could work on."""
    config = GPTConfig.later(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
    tokens = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(1))
    model = GPT.create(config, seed=1)
    compiled = torch.compile(model.loss, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(tokens[:, :-1], tokens[:, 1:])[0], model.loss(tokens[:, :-1], tokens[:, 1:])[0])


class IndexWithoutDevice(TorchFunctionMode):
    """x[...] by way of plain operators: Python's own indexing looks for the device, even for a fake tensor."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ == "__getitem__":
            return self.view(*args)
        if func.__name__ == "__setitem__":
            return torch.ops.aten.copy_.default(self.view(*args[:2]), args[2])
        return func(*args, **(kwargs or {}))

    @staticmethod
    def view(x: torch.Tensor, index) -> torch.Tensor:
        dim = 0
        index = index if isinstance(index, tuple) else (index,)
        for number, at in enumerate(index):
            if at is None:
                x = x.unsqueeze(dim)
            elif at is Ellipsis:
                dim = x.dim() - (len(index) - number - 1) - 1
            elif isinstance(at, int):
                x, dim = torch.ops.aten.select.int(x, dim, at), dim - 1
            else:
                x = torch.ops.aten.slice.Tensor(x, dim, at.start, at.stop)
            dim += 1
        return x


@pytest.mark.parametrize("form", [GPTConfig, GPTConfig.later, GPTConfig.plain])
def test_devices_and_dtypes_agree_on_a_gpu_that_is_not_there(form, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors carry shape, dtype and device through the whole forward pass: one left on the CPU raises."""
    monkeypatch.setattr(flash_attention, "choose_backend", lambda *args: "blocked")
    monkeypatch.setattr("nanochat.loss_head.gpu_memory", lambda device: 2.0**34)
    config = form(sequence_len=16, vocab_size=70, n_layer=3, n_head=2, n_kv_head=1, n_embd=32)
    with torch.device("meta"):
        model = GPT(config, torch.bfloat16)
    with FakeTensorMode(), IndexWithoutDevice(), torch.no_grad():  # autograd would ask the device itself
        everything = [*model.named_parameters(), *model.named_buffers()]
        tensors = {name: torch.empty(t.shape, device="cuda") for name, t in everything}
        tokens = torch.zeros(2, 17, dtype=torch.long, device="cuda")
        logits = torch.func.functional_call(model, tensors, (tokens,))
        loss = torch.func.functional_call(model, tensors, (tokens[:, :-1], tokens[:, 1:]))
        assert (logits.device.type, logits.dtype) == (loss.device.type, loss.dtype) == ("cuda", torch.float32)


@needs_compiler
def test_gradients_of_gradients_are_refused() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(functions.norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
