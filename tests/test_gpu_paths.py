"""Code paths of GPUs, tested without one: the dtype, float16 loss scaling, the device batch size, fp8."""

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
from stubs import stir
from toy_training import CONFIG, CPU, RandomBatches, make_trainer

from nanochat import fp8, runtime
from nanochat.common import UserError
from nanochat.dataloader import Batch
from nanochat.device.dtype import pick_dtype
from nanochat.distributed.rank_checks import NonFiniteLoss
from nanochat.gpt import GPT, GPTConfig, Linear
from nanochat.inference.sampling import SamplingParams, draw_tokens, make_rng
from nanochat.loss_eval import evaluate_bpb
from nanochat.loss_head import head_loss
from nanochat.optim import MuonAdamW, OptimizerConfig, build_param_groups
from nanochat.runtime import Runtime
from nanochat.train import progress
from nanochat.train.progress import Progress
from nanochat.trainer import Trainer

GPU = Runtime(torch.device("cuda"), torch.bfloat16, "test", seed=0)
HALF = replace(CPU, dtype=torch.float16)


# ---------------------------------------------------------------------------------------------------
# Number formats


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((9, 0), torch.bfloat16, "SM80"),
        ((8, 0), torch.bfloat16, "SM80"),
        ((7, 5), torch.float16, "scaled"),
        ((7, 0), torch.float16, "scaled"),
        ((6, 1), torch.float32, "tensor cores"),
    ],
)
def test_number_format_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: capability)
    chosen, why = pick_dtype("cuda")
    assert chosen == dtype and reason in why
    assert Runtime(torch.device("cuda"), chosen, why, 0).scales_loss == (dtype == torch.float16)


def test_attention_never_comes_from_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtime, "open_card", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    try:
        assert torch.backends.cuda.cudnn_sdp_enabled()
        assert Runtime.create("cuda").device.type == "cuda"
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_apple_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.pick_device_type("") == "mps"
    assert pick_dtype("mps")[0] == torch.float32 and pick_dtype("mps", "bfloat16")[0] == torch.bfloat16
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device-type=cpu"):
        Runtime.create("mps")


class OnApple(torch.Tensor):
    """A tensor that claims to be on an Apple GPU, which has no float64."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return torch.device("mps")
        out = super().__torch_function__(func, types, args, kwargs or {})
        assert not (isinstance(out, OnApple) and out.dtype == torch.float64), func
        return out


def test_no_float64_on_an_apple_gpu() -> None:
    class Model(nn.Module):
        device = torch.device("cpu")

        def forward(self, inputs: torch.Tensor, targets: torch.Tensor, loss_reduction: str) -> torch.Tensor:
            return torch.full((targets.numel(),), math.log(2)).as_subclass(OnApple)  # type: ignore[return-value]

    batch = (torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long))
    bytes_each = torch.full((4,), 2)
    assert evaluate_bpb(Model(), [batch], 1, bytes_each) == pytest.approx(0.5)  # type: ignore[arg-type]
    logits = torch.tensor([[0.0, 9.0, 0.0]])
    settings = ([SamplingParams(temperature=1.0, top_p=0.9)], [make_rng(0, 0)])
    assert draw_tokens(logits.as_subclass(OnApple), *settings) == [1]  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------
# float16: scaling of the loss


def weights_of(t: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in t.model.named_parameters()}


@pytest.mark.parametrize("weighted", [False, True])
def test_scaling_changes_no_result(weighted: bool) -> None:
    """In float32, scaling by a power of two is exact: the scaled run equals the plain one up to the order of sums."""
    runs = []
    for where in (CPU, HALF):
        t = make_trainer(steps=3, device_batch_size=4, weights=weighted, runtime=where)
        stir(t.model, 0.05)
        records: list[dict] = []
        t.log = lambda t, record, records=records: records.append(record)  # type: ignore[misc]
        t.run()
        runs.append((weights_of(t), [r["loss"] for r in records], [r.get("loss_scale") for r in records]))
    assert runs[0][2] == [None] * 3 and runs[1][2] == [65536.0] * 3
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-5)
    for name, value in runs[0][0].items():
        torch.testing.assert_close(runs[1][0][name], value, rtol=1e-3, atol=1e-4, msg=name)


def overflow(t: Trainer) -> None:
    """Make one gradient of the following backward passes infinite."""
    t.model.lm_head.weight.register_hook(lambda grad: grad * math.inf)


def test_overflow_skips_the_step_and_halves_the_scale() -> None:
    t = make_trainer(runtime=HALF)
    t.progress.good_steps = 7
    before, state = weights_of(t), t.step.optimizer.named_state({p: n for n, p in t.model.named_parameters()})
    overflow(t)
    record = t.step(t.loader.next_batch())
    assert all(torch.equal(before[name], value) for name, value in weights_of(t).items())
    assert t.step.optimizer.named_state({p: n for n, p in t.model.named_parameters()}) == state
    assert (t.progress.loss_scale, t.progress.good_steps, t.progress.step) == (32768.0, 0, 1)
    assert record["loss_scale"] == 32768.0 and math.isfinite(record["loss"])
    assert all(p.grad is None for p in t.model.parameters())


def test_a_scale_below_one_stops_the_run() -> None:
    t = make_trainer(steps=99, runtime=HALF)
    overflow(t)
    with pytest.raises(NonFiniteLoss, match="gradients"):
        t.run()
    assert t.progress.step == 16  # 2**16, halved until it is below 1


def test_the_scale_doubles_after_enough_good_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "GOOD_STEPS_TO_DOUBLE", 2)
    t = make_trainer(steps=5, runtime=HALF)
    t.run()
    assert (t.progress.loss_scale, t.progress.good_steps) == (2.0**18, 1)
    assert Progress(**asdict(t.progress)) == t.progress  # as it is saved with a checkpoint


def test_all_ranks_skip_when_one_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    t = make_trainer(runtime=HALF)
    before = weights_of(t)
    t.step.accumulate(t.loader.next_batch())
    monkeypatch.setattr(Runtime, "all_reduce_max", lambda self, value, name: 1.0)  # another rank's gradients
    assert not t.step.unscale_gradients() and t.progress.loss_scale == 32768.0
    assert all(torch.equal(before[name], value) for name, value in weights_of(t).items())


def test_a_loss_that_is_not_finite_stops_the_run_in_float16_too() -> None:
    t = make_trainer(steps=3, runtime=HALF)
    t.model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(NonFiniteLoss, match=r"nan.*step 0"):
        t.run()


def test_float16_gradients_are_those_of_float32() -> None:
    grads = []
    batch = RandomBatches(rows=4).next_batch()
    for dtype in (torch.float32, torch.float16):
        t = make_trainer(device_batch_size=2)
        t.model.compute_dtype, t.step.runtime = dtype, replace(CPU, dtype=dtype)
        stir(t.model, 0.05)
        t.step.accumulate(batch)
        assert dtype == torch.float32 or t.step.unscale_gradients()
        grads.append({name: p.grad for name, p in t.model.named_parameters()})
    for name, value in grads[0].items():
        assert (grads[1][name] - value).norm() < 0.03 * value.norm(), name


def test_the_scale_reaches_gradients_before_they_are_rounded_to_float16() -> None:
    """Of unlikely tokens: the gradient's factor exp(-18) underflows float16, even more so divided by 4096 tokens."""
    x, weight = torch.ones(1, 1, dtype=torch.float16), torch.tensor([[20.0], [-3.0]])
    target = torch.tensor([0])
    shares = []
    for factor in (1 / 4096, 65536.0 / 4096):
        w = weight.clone().requires_grad_()
        head_loss(x, w, target, torch.tensor([factor]), cap=15.0)[0].backward()
        shares.append(float(w.grad[1]) / factor)  # type: ignore[index]
    w = weight.double().requires_grad_()
    nn.functional.cross_entropy(15 * torch.tanh(x.double() @ w.T / 15), target).backward()
    assert shares[0] == 0 and shares[1] == pytest.approx(float(w.grad[1]), rel=0.1)  # type: ignore[index]


# ---------------------------------------------------------------------------------------------------
# fp8

WIDE = GPTConfig(sequence_len=16, vocab_size=256, n_layer=2, n_head=2, n_kv_head=1, n_embd=256)


class FakeFloat8(nn.Linear):
    """Replaces torchao's layer: keeps the parameter, and scales its products a little to be recognised."""

    factor = 1.05

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * nn.functional.linear(x, self.weight.to(x.dtype))


def fake_conversion(module: nn.Module, *, module_filter_fn: Any, config: Any) -> nn.Module:
    """Replace modules as torchao.float8.convert_to_float8_training does."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and module_filter_fn(child, name):
                with torch.device("meta"):
                    new = FakeFloat8(child.in_features, child.out_features, bias=False)
                new.weight = child.weight
                setattr(parent, name, new)
    return module


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU of capability 9.0 with torchao, neither of them real."""
    config = SimpleNamespace(from_recipe_name=lambda name: name)
    fake = SimpleNamespace(Float8LinearConfig=config, convert_to_float8_training=fake_conversion)
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(float8=fake))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "torchao.float8", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    yield


def float8_layers(model: GPT) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, FakeFloat8)}


def test_large_layers_of_the_blocks_are_converted_and_keep_their_parameters(hopper: None) -> None:
    model = GPT.create(WIDE, compute_dtype=torch.bfloat16)
    before = dict(model.named_parameters())
    groups = build_param_groups(model, OptimizerConfig(), ns_dtype=torch.bfloat16)
    fp8.convert(model, "rowwise", GPU)
    names = ["attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert float8_layers(model) == {f"transformer.h.{i}.{name}" for i in range(2) for name in names}
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    for old, new in zip(groups, build_param_groups(model, OptimizerConfig(), ns_dtype=torch.bfloat16), strict=True):
        assert [id(p) for p in old["params"]] == [id(p) for p in new["params"]]


def test_evaluation_runs_in_bfloat16_and_training_continues_in_fp8(hopper: None) -> None:
    model, tokens = GPT.create(WIDE, compute_dtype=torch.bfloat16), torch.arange(32).view(2, 16)
    stir(model, 0.05)
    plain, names = model(tokens), list(model.state_dict())
    fp8.convert(model, "tensorwise", GPU)
    layers = float8_layers(model)
    modules = [model.get_submodule(name) for name in layers]
    assert not torch.equal(model(tokens), plain)
    with pytest.raises(ZeroDivisionError), fp8.without_fp8(model):
        assert torch.equal(model(tokens), plain) and not float8_layers(model)
        assert all(isinstance(model.get_submodule(name), Linear) for name in layers)
        assert list(model.state_dict()) == names
        raise ZeroDivisionError  # an evaluation that fails must not leave the model half converted
    assert [model.get_submodule(name) for name in layers] == modules and list(model.state_dict()) == names


class Doubled(Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_layers_of_another_class_stay_as_they_are(hopper: None, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokens = stir(GPT.create(WIDE, compute_dtype=torch.bfloat16), 0.05), torch.arange(32).view(2, 16)
    mlp = model.blocks[0].mlp
    mlp.c_fc.__class__ = Doubled
    plain = model(tokens)
    fp8.convert(model, "tensorwise", GPU)
    assert type(mlp.c_fc) is Doubled and "transformer.h.0.mlp.c_proj" in float8_layers(model)
    with fp8.without_fp8(model):
        assert torch.equal(model(tokens), plain)
    (line,) = capsys.readouterr().err.splitlines()
    assert "0.mlp.c_fc" in line


@pytest.mark.parametrize("factor", [2.0, math.nan])
def test_a_conversion_with_wrong_results_is_undone(
    factor: float, hopper: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeFloat8, "factor", factor)
    model, tokens = stir(GPT.create(WIDE, compute_dtype=torch.bfloat16), 0.05), torch.arange(32).view(2, 16)
    plain = model(tokens)
    fp8.convert(model, "tensorwise", GPU)
    assert not float8_layers(model) and torch.equal(model(tokens), plain)
    assert "bfloat16" in capsys.readouterr().err


def test_an_edited_linear_is_refused(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT.create(WIDE, compute_dtype=torch.bfloat16)
    monkeypatch.setattr(Linear, "forward", lambda self, x: 2 * nn.functional.linear(x, self.weight.to(x.dtype)))
    with pytest.raises(UserError, match=r"Linear\.forward"):
        fp8.convert(model, "tensorwise", GPU)


@pytest.mark.filterwarnings("ignore")  # of torchao about other versions, and of the compiler about itself
@pytest.mark.parametrize("recipe", fp8.RECIPES)
def test_real_torchao_trains_like_bfloat16(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own layers, the 8-bit products emulated in float32; one graph under torch.compile."""
    torchao = pytest.importorskip("torchao.float8")
    real = torchao.Float8LinearConfig.from_recipe_name
    emulated = SimpleNamespace(from_recipe_name=lambda name: replace(real(name), emulate=True))
    monkeypatch.setattr(torchao, "Float8LinearConfig", emulated)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (8, 9))
    # On a CPU the C form of relu_squared works in place, which these layers do not allow; CUDA has no C forms.
    monkeypatch.setattr("nanochat.cpu.fused.usable", lambda *args: False)
    curves = []
    for converted in (False, True):
        model = GPT.create(WIDE, compute_dtype=torch.bfloat16, seed=1)
        if converted:
            fp8.convert(model, recipe, GPU)
            assert len(fp8.converted_layers(model)) == 12
        groups = build_param_groups(model, OptimizerConfig(), lr_scale=0.2, weight_decay=0.0, ns_dtype=torch.float32)
        optimizer, losses = MuonAdamW(groups), []
        tokens = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(0))
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        loss_fn = torch.compile(model.loss, backend="aot_eager", fullgraph=True) if converted else model.loss
        for _ in range(4):
            total, _ = loss_fn(inputs, targets)
            (total / 64).backward()
            optimizer.step()
            model.zero_grad()
            losses.append(float(total.detach()) / 64)
        curves.append(losses)
    plain, found = curves
    assert plain[-1] < plain[0] - 1 and found == pytest.approx(plain, rel=0.02) and found != plain


def test_a_model_without_fp8_is_unchanged() -> None:
    model = GPT.create(CONFIG)
    modules = dict(model.named_modules())
    with fp8.without_fp8(model):
        assert dict(model.named_modules()) == modules


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"recipe": "blockwise"}, "--fp8-recipe.*tensorwise, rowwise"),
        ({"where": CPU}, "cpu"),
        ({"capability": (8, 6)}, r"8\.9.*8\.6"),
        ({"dtype": torch.float32}, "bfloat16.*float32"),
        ({"sequence_len": 24}, "--max-seq-len.*16"),
        ({"n_embd": 32}, "128"),
        ({"torchao": None}, r"nanochat\[torchao\]"),
    ],
    ids=str,
)
def test_refusals(hopper: None, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], part: str) -> None:
    given = {"recipe": "tensorwise", "where": GPU, "capability": (8, 9), "dtype": torch.bfloat16, **change}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: given["capability"])
    if "torchao" in given:
        monkeypatch.setitem(sys.modules, "torchao.float8", None)  # type: ignore[arg-type]
    sizes = {name: change[name] for name in ("sequence_len", "n_embd") if name in change}
    with torch.device("meta"):
        model = GPT(replace(WIDE, **sizes), given["dtype"])
    with pytest.raises(UserError, match=part):
        fp8.convert(model, given["recipe"], given["where"])
    assert not float8_layers(model)


def test_a_batch_is_pinned_on_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: torch.Tensor) -> torch.Tensor:
        raise AssertionError("pinned memory belongs to CUDA")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    t = make_trainer()
    tokens = torch.zeros(2, 16, dtype=torch.long)
    assert len(list(t.step.micro_batches(Batch(tokens, tokens, None, "")))) == 1
    t.step.runtime = replace(CPU, device=torch.device("meta"))  # stands for any device that is not CUDA
    assert len(list(t.step.micro_batches(Batch(tokens, tokens, None, "")))) == 1


def test_the_host_does_not_wait_for_a_copy_to_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch does not wait for a copy from pinned memory only."""
    calls: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: calls.append((args, kwargs)) or self)
    runtime.to_device(torch.zeros(2), GPU.device)
    assert calls == ["pinned", ((GPU.device,), {"non_blocking": True})]
    runtime.to_device(torch.zeros(2), CPU.device)
    assert calls[2:] == [((CPU.device,), {})]


def test_a_machine_without_glibc_trains_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: Any) -> Any:
        raise OSError("no such library")

    monkeypatch.setattr("nanochat.runtime.ctypes.CDLL", no_library)
    assert Runtime.create("cpu").device.type == "cpu"


@pytest.mark.parametrize(
    ("release", "given", "expected"),
    [
        ("6.8.0-generic", {}, "expandable_segments:True"),
        ("6.8.0-generic", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, "max_split_size_mb:128"),
        ("6.8.0-generic", {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, None),
        ("5.15.167.4-microsoft-standard-WSL2", {}, None),
    ],
)
def test_the_allocator_of_cuda_is_set_before_it_is_used(
    monkeypatch: pytest.MonkeyPatch, release: str, given: dict[str, str], expected: str | None
) -> None:
    """At the first call that may initialise CUDA."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    seen: list[str | None] = []

    def initialise(device: Any) -> None:
        seen.append(os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
        raise ZeroDivisionError

    monkeypatch.setattr("platform.release", lambda: release)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtime, "open_card", initialise)
    with pytest.raises(ZeroDivisionError):
        Runtime.create("cuda")
    assert seen == [expected]
