"""GPUs that cannot be used as they are, torch.compile where it does not work, and --deterministic: without a GPU."""

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stubs import TINY
from toy_training import CONFIG, CPU

from nanochat import runtime
from nanochat.common import UserError
from nanochat.device import compiler, cuda
from nanochat.device.compiler import why_not_compiling
from nanochat.device.cuda import has_code, open_card, other_build, why_none
from nanochat.device.dtype import pick_dtype
from nanochat.gpt import GPT
from nanochat.inference.sampling import SamplingParams, draw_tokens, make_rng
from nanochat.runtime import Runtime
from nanochat.train import compiling
from nanochat.train.compiling import CompiledLoss, compiled_loss
from nanochat.train.config import TrainConfig, merge_saved_config
from scripts import _cli, base_train

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
GPU = Runtime(torch.device("cuda", 0), torch.bfloat16, "test", seed=0)
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # torch 2.11 and 2.13 say so
CU128 = ["sm_70", *CU130]  # torch 2.9 and 2.10
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]

# ---------------------------------------------------------------------------------------------------
# The card


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((7, 0), CU130, False),  # Volta
        ((7, 0), CU128, True),
        ((6, 1), CU130, False),  # Pascal
        ((6, 1), CU126, True),  # by sm_60
        ((5, 2), CU126, True),
        ((3, 7), CU126, False),
        ((7, 5), CU130, True),  # T4, GTX 16xx
        ((8, 7), CU130, True),  # Jetson Orin, by sm_86
        ((8, 9), CU130, True),  # 4090
        ((9, 0), CU130, True),
        ((10, 0), CU126, False),  # B200 and older builds
        ((10, 3), CU130, True),
        ((11, 0), CU130, False),  # Jetson Thor: only in builds for ARM
        ((12, 1), CU130, True),  # GB10, by sm_120
        ((12, 0), CU126, False),
        ((13, 0), CU130, False),  # newer than the build
        ((13, 0), [*CU130, "compute_120"], True),  # PTX
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),
        ((10, 3), ["sm_100f"], True),
        ((12, 0), ["compute_100f"], False),
    ],
    ids=str,
)
def test_builds_and_the_cards_they_run_on(capability: tuple[int, int], archs: list[str], runs: bool) -> None:
    assert has_code(archs, capability) == runs


@pytest.mark.parametrize(
    ("capability", "cuda_version", "part"),
    [
        ((7, 0), "13.0", "whl/cu126"),
        ((6, 1), "12.8", "whl/cu126"),
        ((12, 0), "12.6", "whl/cu130"),
        ((13, 0), "13.0", "--upgrade torch"),
    ],
)
def test_the_build_to_install(
    capability: tuple[int, int], cuda_version: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda_version)
    assert part in other_build(capability) and "pip install" in other_build(capability)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A V100 with a build for CUDA 13, on which every computation fails with `error`; None: it succeeds."""
    fake = SimpleNamespace(
        capability=(7, 0), error=RuntimeError("CUDA error: no kernel image is available\nmore"), current=None
    )

    real = torch.ones

    def ones(*size: int, device: Any = "cpu") -> torch.Tensor:
        if device == "cpu":
            return real(size)
        assert fake.current == device, "set before anything is allocated"
        if fake.error:
            raise fake.error
        return torch.zeros(size)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: fake.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CU130)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(fake, "current", device))
    monkeypatch.setattr(cuda.torch, "ones", ones)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    precision = torch.get_float32_matmul_precision()
    yield fake
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_a_card_without_code_is_named_with_the_build_that_has_it(card: SimpleNamespace) -> None:
    with pytest.raises(UserError) as caught:
        Runtime.create("cuda")
    line = str(caught.value)
    assert "\n" not in line
    for part in ("Tesla V100", "7.0", "CUDA 13.0", "sm_75", torch.__version__.split("+")[0], "whl/cu126"):
        assert part in line


@pytest.mark.parametrize("error", [RuntimeError("CUDA-capable device(s) is/are busy"), AssertionError("x")])
def test_a_card_that_fails_otherwise_is_one_line_too(card: SimpleNamespace, error: Exception) -> None:
    card.capability, card.error = (9, 0), error
    with pytest.raises(UserError, match=rf"Tesla V100.*{str(error)[:9]}.*nvidia-smi"):
        open_card(torch.device("cuda", 1))
    card.error = None
    open_card(torch.device("cuda", 1))


def test_a_driver_that_cannot_map_memory_in_pages(card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a vGPU: the allocator's usual way works."""
    settings: list[str] = []

    def change(setting: str) -> None:
        settings.append(setting)
        card.error = None

    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", change)
    card.capability, card.error = (8, 0), RuntimeError("CUDA driver error: operation not supported")
    open_card(torch.device("cuda", 0))
    assert settings == ["expandable_segments:False"]
    card.error = RuntimeError("CUDA error: out of memory")
    with pytest.raises(UserError, match="out of memory"):
        open_card(torch.device("cuda", 0))
    assert len(settings) == 1


TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update it from the URL"


@pytest.mark.parametrize(
    ("build", "visible", "error", "parts"),
    [
        (None, None, "", ["built without CUDA", "whl/cu130"]),
        ("13.0", None, TOO_OLD, ["11040)", "whl/cu126"]),
        ("13.0", "0", TOO_OLD, ["11040)"]),
        ("13.0", "", "No CUDA GPUs are available", ["CUDA_VISIBLE_DEVICES=''"]),
        ("13.0", "7", "No CUDA GPUs are available", ["CUDA_VISIBLE_DEVICES='7'"]),
        ("13.0", None, "Found no NVIDIA driver on your system. Please check", ["--gpus all"]),
        ("13.0", "0", "Found no NVIDIA driver on your system. Please check", ["--gpus all"]),
    ],
)
def test_a_gpu_that_pytorch_does_not_find_is_not_passed_over(
    build: str | None,
    visible: str | None,
    error: str,
    parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def init() -> None:
        raise RuntimeError(error)

    monkeypatch.setattr(cuda, "DRIVER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert Runtime.create().device.type == "cpu"
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in parts)
    Runtime.create("cpu")  # as requested
    assert not capsys.readouterr().err
    with pytest.raises(UserError) as caught:
        Runtime.create("cuda")
    assert parts[0] in str(caught.value)


def test_machines_without_an_nvidia_driver_say_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "DRIVER", tmp_path / "nothing")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert why_none("") == ""


def test_amd_generations_are_not_read_as_compute_capabilities(
    card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.version, "cuda", None)
    card.error, card.capability = None, (6, 0)
    started = Runtime.create("cuda")
    assert started.dtype == torch.bfloat16 and "AMD" in started.dtype_reason
    card.error = RuntimeError("busy")
    with pytest.raises(UserError, match="busy"):
        open_card(torch.device("cuda", 0))


def test_float32_is_not_tf32(card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    card.error = None
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 does
    assert "TF32" in Runtime.create("cuda", "float32").dtype_reason
    assert torch.get_float32_matmul_precision() == "highest"
    assert "TF32" not in pick_dtype("cpu", "float32")[1] + pick_dtype("cuda", "bfloat16")[1]


# ---------------------------------------------------------------------------------------------------
# torch.compile


@pytest.fixture
def not_cached() -> Iterator[None]:
    why_not_compiling.cache_clear()
    yield
    why_not_compiling.cache_clear()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def test_pascal_is_not_compiled_for(card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, not_cached: None) -> None:
    card.capability = (6, 1)
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: pytest.fail("not even tried"))
    assert "6.1" in why_not_compiling(torch.device("cuda", 0))


def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch, not_cached: None) -> None:
    """Found by the real Inductor; --compile=on is refused, auto trains without."""
    import torch._inductor.config as inductor

    monkeypatch.setattr("shutil.which", lambda name: None)
    with inductor.patch({"cpp.cxx": (None, "/nonexistent"), "fx_graph_cache": False}):
        reason = why_not_compiling(torch.device("cpu"))
    assert "/nonexistent" in reason and "apt install gcc" in reason and "\n" not in reason
    model = GPT.create(CONFIG)
    assert compiled_loss(model, "auto", CPU) == model.loss
    with pytest.raises(UserError, match=r"--compile=on.*/nonexistent"):
        compiled_loss(model, "on", CPU)


def test_missing_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, not_cached: None) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied", "/tmp/torchinductor")

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/gcc")
    monkeypatch.setattr(compiler.sysconfig, "get_path", lambda name: str(tmp_path))
    reason = why_not_compiling(torch.device("cpu"))
    assert "/tmp/torchinductor" in reason and "python3-dev" in reason


def test_all_ranks_compile_or_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = GPT.create(CONFIG)
    monkeypatch.setattr(compiling, "why_not_compiling", lambda device: "")
    monkeypatch.setattr(compiling, "prepare", lambda *args: None)
    assert isinstance(compiled_loss(model, "auto", GPU), CompiledLoss)
    monkeypatch.setattr(Runtime, "all_gather", lambda self, value, name: [value, "no compiler on rank 1"])
    assert compiled_loss(model, "auto", GPU) == model.loss
    (line,) = capsys.readouterr().err.splitlines()
    assert "rank 1" in line


def failing_backend(where: str, message: str) -> Any:
    """A compiler that fails on the forward graph or on the backward one."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    def fail(graph: Any, inputs: Any) -> Any:
        raise RuntimeError(f"{message}\nsecond line")

    def plain(graph: Any, inputs: Any) -> Any:
        return make_boxed_func(graph)

    compilers = {"fw_compiler": plain, "bw_compiler": plain} | {f"{where}_compiler": fail}
    return aot_autograd(**compilers)


def small_model() -> Any:
    """A loss and its weight, for the compiler to fail on sooner than on a GPT."""
    weight = torch.linspace(0, 1, 8, requires_grad=True)

    def loss(inputs: torch.Tensor, targets: torch.Tensor, weights: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        losses = (inputs * weight - targets).square()
        return losses.sum(), losses.detach()

    return SimpleNamespace(loss=loss)


@pytest.mark.parametrize("where", ["fw", "bw"])
def test_a_compilation_that_fails_leaves_the_plain_loss(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], not_cached: None
) -> None:
    model, compile = small_model(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda fn, **kwargs: compile(fn, backend=failing_backend(where, "an inductor bug"), **kwargs)
    )
    loss_fn = CompiledLoss(model, required=False)
    batch = (torch.ones(3, 8), torch.zeros(3, 8))
    for _ in range(2):
        assert torch.equal(loss_fn(*batch)[0], model.loss(*batch)[0])
    (line,) = capsys.readouterr().err.splitlines()
    assert "an inductor bug" in line
    with pytest.raises(UserError, match=r"--compile=on.*an inductor bug"):
        CompiledLoss(model, required=True)(*batch)


def test_memory_that_a_compilation_lacks_is_left_to_the_search_for_a_batch(
    monkeypatch: pytest.MonkeyPatch, not_cached: None
) -> None:
    backend, compile = failing_backend("fw", "CUDA error: out of memory"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **kwargs: compile(fn, backend=backend, **kwargs))
    loss_fn = CompiledLoss(small_model(), required=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        loss_fn(torch.ones(3, 8), torch.zeros(3, 8))
    assert not loss_fn.failed


# ---------------------------------------------------------------------------------------------------
# --deterministic


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch's setting and the environment as they were, afterwards."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def test_cuda_is_set_before_it_starts(card: SimpleNamespace, restored: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "open_card", lambda device: seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
    seen: list[str | None] = []
    Runtime.create("cuda")
    assert not torch.are_deterministic_algorithms_enabled()
    Runtime.create("cuda", deterministic=True)
    assert seen == [None, ":4096:8"] and os.environ["NCCL_ALGO"] == "Ring"
    assert torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    code, line = _cli.describe(caught.value)
    assert code == 2 and "--deterministic" in line and "put_" in line


def test_tokens_are_drawn_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA has no deterministic cumsum; the draw is the same there."""

    class OnGPU(torch.Tensor):
        def cpu(self, *args: Any) -> torch.Tensor:
            moved.append(self)
            return self.as_subclass(torch.Tensor)

    moved: list[torch.Tensor] = []
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    settings = [SamplingParams(top_p=0.9)] * 2
    wanted = draw_tokens(logits, settings, [make_rng(0, i) for i in range(2)])
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    drawn = draw_tokens(logits.as_subclass(OnGPU), settings, [make_rng(0, i) for i in range(2)])
    assert drawn == wanted and len(moved) == 1


def test_a_resumed_run_keeps_it(restored: None) -> None:
    saved = asdict(TrainConfig(deterministic=True))
    merged, ignored = merge_saved_config(TrainConfig(), saved)
    assert merged.deterministic and not ignored
    Runtime(torch.device("cuda"), torch.float32, "", 0).make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    given = Runtime(torch.device("cuda"), torch.float32, "", 0, world_size=2, deterministic=True)
    given.make_deterministic()
    with pytest.raises(UserError, match="--deterministic"):  # NCCL has read its environment
        Runtime(torch.device("cuda"), torch.float32, "", 0, world_size=2).make_deterministic()


def test_a_cpu_accepts_it_and_says_so(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*TINY, f"--data={copied / 'text.jsonl'}", "--device-type=cpu", "--model-tag=same"]
    assert base_train.main([*flags, "--deterministic"]) == 0
    assert "--deterministic" in capsys.readouterr().out
    assert not torch.are_deterministic_algorithms_enabled()
    assert base_train.main([*flags, "--resume"]) == 0
    assert "--deterministic" in capsys.readouterr().out
