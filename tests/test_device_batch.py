"""The search for a device batch on a GPU, with the GPU faked; running out of memory; resuming on a smaller card."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import NOMINAL, FakeCard, fake_card
from ranks import run_ranks
from stubs import TINY
from toy_training import CPU, make_trainer

from nanochat.checkpoint.runs import run_dir
from nanochat.checkpoint_manager import open_checkpoint
from nanochat.common import UserError, is_out_of_memory
from nanochat.distributed.collectives import CollectiveFailed, collective_op
from nanochat.gpt import GPT
from nanochat.planning.hardware import Gpu
from nanochat.planning.memory import memory_by_kind
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train import device_batch
from nanochat.train.device_batch import USABLE_SHARE, find_device_batch, try_on_all_ranks
from scripts import base_train, chat_rl, chat_sft
from tasks.formats import Format

# ---------------------------------------------------------------------------------------------------
# Errors

NCCL = (
    "NCCL error in: ProcessGroupNCCL.cpp:77, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
)
SHARED = "out of resource: shared memory, Required: 147456, Hardware limit: 101376. Reducing block sizes may help."


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ..."), True),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously ..."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate"), True),
        (torch.distributed.DistBackendError(NCCL + "Failed to CUDA calloc async 608 bytes"), True),
        (torch.distributed.DistBackendError(NCCL + "Cuda failure 2 'out of memory'"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17.5 GB)"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),
        (MemoryError(), True),
        (type("OutOfResources", (Exception,), {})(SHARED), False),
        (RuntimeError(f"backend='inductor' raised:\nOutOfResources: {SHARED}"), False),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), False),
        (torch.distributed.DistBackendError(NCCL + "Cuda failure 719 'unspecified launch failure'"), False),
        (TypeError("'NoneType' object is not callable"), False),
        (ValueError("a prompt about running out of memory"), False),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, Exception) else "",
)
def test_what_running_out_of_memory_looks_like(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_a_collective_that_runs_out_of_memory_blames_no_other_rank() -> None:
    with pytest.raises(torch.distributed.DistBackendError), collective_op("summing", 0):
        raise torch.distributed.DistBackendError(NCCL + "Failed to CUDA calloc async 608 bytes")
    with pytest.raises(CollectiveFailed), collective_op("summing", 0):
        raise torch.distributed.DistBackendError("Socket Timeout")


# ---------------------------------------------------------------------------------------------------
# The search


def search(first: int, row_bytes: float, usable: float = 100.0, constant: float = 10.0) -> tuple[int, list[int]]:
    """(rows found, sizes tried) of 1 to 32 rows, where `rows` take constant + rows * row_bytes."""
    tried: list[int] = []

    def trial(rows: int) -> float:
        tried.append(rows)
        if constant + rows * row_bytes > usable:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return constant + rows * row_bytes

    sizes = [1, 2, 4, 8, 16, 32]

    def predict(size: int, rows: int, peak: float) -> float:
        return constant + (peak - constant) * size / rows

    return find_device_batch(trial, sizes, first, predict, usable, CPU)[0], tried


@pytest.mark.parametrize("fitting", [1, 2, 5, 8, 31, 32, 99])
@pytest.mark.parametrize("first", [1, 4, 32])
def test_the_largest_fitting_size_is_found_from_any_start(fitting: int, first: int) -> None:
    found, tried = search(first, 90 / (fitting + 0.5))
    assert found == max(size for size in (1, 2, 4, 8, 16, 32) if size <= fitting)
    assert len(set(tried)) == len(tried), "each size is compiled once"
    if found >= first:  # the memory of the first trial says which size is the largest
        assert tried == ([first] if found == first else [first, found])
    else:
        assert tried == [size for size in (32, 16, 8, 4, 2, 1) if found <= size <= first]


def test_what_was_expected_to_fit_and_does_not_is_left() -> None:
    """Memory that jumps between sizes: the search goes back to the size that fitted, and does not repeat it."""
    tried: list[int] = []

    def trial(rows: int) -> float:
        tried.append(rows)
        if rows > 8:
            raise RuntimeError("CUDA error: out of memory")
        return 10.0 + rows

    assert find_device_batch(trial, [1, 2, 4, 8, 16, 32], 8, lambda *given: 0.0, 60.0, CPU) == (8, 18.0)
    assert tried == [8, 32, 16]


def test_a_model_too_large_for_one_row_is_refused() -> None:
    with pytest.raises(UserError, match="--depth"):
        search(4, 1000.0)


def test_other_errors_of_a_trial_surface() -> None:
    def trial(rows: int) -> float:
        raise TypeError("'NoneType' object is not callable")

    with pytest.raises(TypeError):
        find_device_batch(trial, [1, 2], 2, lambda *given: 0.0, 1.0, CPU)


class Activations:
    """Held by a frame of the failing trial, and by a cycle, as dynamo's and autograd's objects are."""

    def __init__(self) -> None:
        self.itself = self


def test_a_failed_trial_leaves_nothing_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Activations]] = []
    at_release: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: at_release.append(alive[-1]() is not None))

    def backward(held: Activations) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError as error:
            raise RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory") from error

    def trial(rows: int) -> float:
        held = Activations()
        alive.append(weakref.ref(held))
        backward(held)
        return 0.0

    gc.disable()
    try:
        assert try_on_all_ranks(trial, 4, CPU) == device_batch.OUT_OF_MEMORY
    finally:
        gc.enable()
    assert at_release == [False]


def search_on_a_rank(runtime: Runtime, fitting: list[int], broken: int) -> Any:
    """This rank's result, where rank i has room for fitting[i] rows, and rank `broken` meets another error: that or
    the name of this rank's error, and the sizes that were tried."""
    tried = []

    def trial(rows: int) -> float:
        tried.append(rows)
        if runtime.rank == broken and rows == 4:
            raise ValueError("no kernel image")
        if rows > fitting[runtime.rank]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0 + rows

    try:
        return find_device_batch(trial, [1, 2, 4, 8], 8, lambda *given: 0.0, 100.0, runtime), tried
    except (CollectiveFailed, ValueError) as error:
        return type(error).__name__, tried


def test_ranks_take_what_fits_on_all_and_end_together() -> None:
    assert run_ranks(2, search_on_a_rank, [8, 3], -1) == [((2, 3.0), [8, 4, 2])] * 2
    ended = run_ranks(2, search_on_a_rank, [8, 4], 1, timeout=20)
    assert ended == [("CollectiveFailed", [8, 4]), ("ValueError", [8, 4])], "no rank goes on without the others"


# ---------------------------------------------------------------------------------------------------
# The three stages, with a GPU's memory faked


def usage(model: GPT, rows: int, T: int, factor: float = 1.0) -> float:
    """The planner's bytes of a micro-batch; activations are multiplied by `factor`."""
    gpu = Gpu("fake", NOMINAL, 0.0, None, 0.0, None, "float32")
    kinds = memory_by_kind(replace(model.config, sequence_len=T), gpu, 1, rows)
    return sum(kinds.values()) - kinds["context"] + (factor - 1) * kinds["activations"]


def card_for(base: Path, rows: int, T: int, factor: float = 1.0) -> FakeCard:
    """A card on which the tiny model can train `rows` rows of T tokens at a time, and no more."""
    with torch.device("meta"):
        model = GPT(open_checkpoint(run_dir(base, "base", "tiny")).model_config())
    return FakeCard(usage(model, rows, T, factor) / USABLE_SHARE * 1.001, partial(usage, factor=factor))


FEW_NGRAMS = "--recipe=small,ngram_rows=97"


@pytest.fixture
def plain_base(copied: Path) -> Path:
    """A base folder with a small table of n-grams: the usual one would need more than the activations."""
    shutil.rmtree(run_dir(copied, "base", "tiny"))
    assert base_train.main([*TINY, FEW_NGRAMS, f"--data={copied / 'text.jsonl'}"]) == 0
    return copied


class Lengths(Format):
    """Longer answers earn more, so that most groups have something to learn."""

    def reward(self, conversation: Any, completion: str) -> float:
        return float(len(completion))


PROMPT, ANSWER = 12, 3  # tokens; the model's context has 16


def script_of(stage: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[[list[str]], int], int]:
    """(main with the flags of three steps of 32 rows on CUDA, the tokens of its rows)."""
    flags = ["--device-type=cuda", "--num-iterations=3", "--model-tag=faked", "--save-every=1", "--keep-last=0"]
    if stage == "rl":
        shutil.copytree(base / "base_checkpoints" / "tiny", base / "chatsft_checkpoints" / "tiny")
        monkeypatch.setattr("tasks.rl_tasks.make_levels", lambda *args, **kwargs: [Lengths(50)])
        monkeypatch.setattr(RustBPETokenizer, "render_for_completion", lambda self, item: [5] * PROMPT)
        flags += ["--examples-per-step=16", "--num-samples=2", f"--max-new-tokens={ANSWER}", "--eval-examples=1"]
        return lambda more: chat_rl.main([*flags, *more]), PROMPT + ANSWER
    if stage == "sft":
        path = base / "chats.jsonl"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        path.write_text((json.dumps(turns) + "\n") * 2)
        flags += ["--total-batch-size=384", f"--data={path}", "--eval-tokens=16", "--max-seq-len=12"]
        return lambda more: chat_sft.main([*flags, *more]), 12
    model = [f for f in TINY if f.startswith(("--depth", "--n-embd", "--head-dim", "--max-seq-len", "--eval-tokens"))]
    flags += [*model, FEW_NGRAMS, "--total-batch-size=512", f"--data={base / 'text.jsonl'}"]
    return lambda more: base_train.main([*flags, *more]), 16


@pytest.mark.parametrize("stage", ["base", "sft", "rl"])
def test_each_stage_searches_its_device_batch_and_trains(
    stage: str, plain_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU without --device-batch-size: of 32 rows a step, 8 fit at once."""
    main, T = script_of(stage, plain_base, monkeypatch)
    with fake_card(monkeypatch, card_for(plain_base, 8, T)) as card:
        assert main([]) == 0
    saved = open_checkpoint(run_dir(plain_base, stage, "faked"))
    assert saved.step == 3 and saved.meta["runtime"]["device_batch_size"] == 8
    assert saved.meta["user_config"]["device_batch_size"] == -1
    assert card.trained[:2] == [(8, T)] * 2 and max(rows for rows, _ in card.trained) == 8
    assert card.fraction == 1.0, "evaluation and samples may use the margin"
    if stage != "rl":  # whose answers have other lengths
        assert card.compiled == [(8, T)] and len(card.trained) == 2 + 3 * 4


@pytest.mark.parametrize(("factor", "rows"), [(0.1, 32), (10.0, 4)])
def test_a_wrong_estimate_costs_few_compilations(
    factor: float, rows: int, plain_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too high: one more, as the first trial's memory says which size is right. Too low: one for each halving."""
    main, T = script_of("base", plain_base, monkeypatch)
    with fake_card(monkeypatch, card_for(plain_base, rows, T, factor)) as card:
        assert main([]) == 0
    first, *others = [size for size, _ in card.compiled]
    assert others == ([rows] if rows == 32 else [first >> i for i in range(1, (first // rows).bit_length())]) != []


def losses_of(base: Path, tag: str = "faked") -> list[float]:
    lines = (run_dir(base, "base", tag) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]


def test_a_run_resumes_on_a_smaller_card(plain_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The saved device batch does not fit there; the data and the losses stay."""
    main, T = script_of("base", plain_base, monkeypatch)
    with fake_card(monkeypatch, card_for(plain_base, 32, T)):
        assert main([]) == 0
    losses = losses_of(plain_base)
    for card, rows, more in (
        (card_for(plain_base, 8, T), 8, []),
        (card_for(plain_base, 32, T), 32, []),
        (card_for(plain_base, 32, T), 4, ["--device-batch-size=4"]),
    ):
        with fake_card(monkeypatch, card):
            assert main(["--resume-from-step=1", *more]) == 0
        again = open_checkpoint(run_dir(plain_base, "base", "faked"))
        assert again.meta["runtime"]["device_batch_size"] == rows
        assert len(losses) == 3 and losses_of(plain_base) == pytest.approx(losses, rel=1e-5)


def test_memory_that_ends_within_a_run_names_the_flag(
    plain_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main, _ = script_of("base", plain_base, monkeypatch)
    with fake_card(monkeypatch, FakeCard(0.0, usage)):
        assert main(["--device-batch-size=8"]) == 1
    assert "--device-batch-size=4" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------
# Without a GPU


def test_a_resumed_run_keeps_its_device_batch_or_takes_the_given_one(copied: Path) -> None:
    flags = [
        *TINY,
        f"--data={copied / 'text.jsonl'}",
        "--total-batch-size=128",
        "--num-iterations=3",
        "--save-every=1",
        "--keep-last=0",
    ]
    assert base_train.main([*flags, "--model-tag=kept", "--device-batch-size=3"]) == 0
    folder = run_dir(copied, "base", "kept")
    weights, losses = open_checkpoint(folder).model_state(), losses_of(copied, "kept")
    for more, rows in (([], 3), (["--device-batch-size=8"], 8)):
        assert base_train.main([*flags, "--model-tag=kept", "--resume-from-step=1", *more]) == 0
        again = open_checkpoint(folder)
        assert again.meta["runtime"]["device_batch_size"] == rows
        assert losses_of(copied, "kept") == pytest.approx(losses, rel=1e-4)  # 2e-5: backout's gradient is noise there
        if rows == 3:
            assert all((again.model_state()[name] == weights[name]).all() for name in weights)


def test_a_trial_changes_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    t = make_trainer(device_batch_size=8)
    before, random = {n: p.detach().clone() for n, p in t.model.named_parameters()}, torch.get_rng_state()
    seen: list[tuple[int, ...]] = []
    t.step.loss_fn = lambda inputs, *rest: seen.append(tuple(inputs.shape)) or t.model.loss(inputs, *rest)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 7)
    assert device_batch.try_micro_batches(t.step, 5, T=16) == 7
    assert seen == [(5, 16), (5, 16)] and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[n], p) for n, p in t.model.named_parameters())
    assert all(p.grad is None for p in t.model.parameters()) and not t.step.optimizer.state


def test_optimizer_state_that_is_there_is_not_counted_again() -> None:
    t = make_trainer()
    missing = device_batch.missing_state_bytes(t.step)
    assert missing == sum(
        8 * p.numel() if p.dim() < 2 or "h." not in n else 4 * (p.numel() + max(p.shape))
        for n, p in t.model.named_parameters()
    )
    t.step(t.loader.next_batch())
    assert device_batch.missing_state_bytes(t.step) == 0
