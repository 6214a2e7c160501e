"""What only an NVIDIA GPU can show, against the same on the CPU. Skipped where there is none.

In order of their cost; those marked `compiles` (torch.compile, minutes of it) run after all others.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_flash_attention import random_qkv, reference
from test_golden_curve import SIZES
from test_gpt import FORMS, randomized, tokens
from toy_training import MarkovBatches

from nanochat import fp8
from nanochat.common import sha256_file
from nanochat.engine import Engine
from nanochat.flash_attention import BACKENDS, choose_backend, fa3_kernel, flash_attn_func
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference import graph_decoder
from nanochat.inference.decoding import RunningBatch
from nanochat.inference.decoding_weights import DecodingWeights
from nanochat.inference.graph_decoder import GraphDecoder
from nanochat.inference.kv_cache import KVCache, plain_step, prefill
from nanochat.inference.request import GenerationRequest
from nanochat.inference.sampling import SamplingParams
from nanochat.inference.tools import ToolTable
from nanochat.optim import DistMuonAdamW, MuonAdamW, OptimizerConfig, build_param_groups
from nanochat.runtime import Runtime
from nanochat.train.compiling import compiled_loss
from nanochat.train.device_batch import fit_device_batch
from nanochat.train.schedules import ScheduleConfig
from nanochat.train.step import TrainStep
from nanochat.trainer import Trainer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore"),
]  # the compiler's own

ROOT = Path(__file__).parent.parent
COMPILED = pytest.param("on", marks=pytest.mark.compiles)
GPU = torch.device("cuda", 0)  # as Runtime.create names it; set_per_process_memory_fraction takes no other form
CONFIG = GPTConfig(sequence_len=256, vocab_size=300, n_layer=4, n_head=2, n_kv_head=2, n_embd=128)


def on(device: torch.device, dtype: torch.dtype = torch.float32) -> Runtime:
    return Runtime(device, dtype, "test", seed=0)


def moved(model: GPT, dtype: torch.dtype = torch.float32) -> GPT:
    """The same weights on the GPU."""
    copy = GPT.create(model.config, GPU, dtype)
    copy.load_state_dict(model.state_dict())
    return copy


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.cpu().double() - wanted.double()).norm() / wanted.double().norm())


# ---------------------------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("T, window, G", [(256, 64, 4), (256, -1, 4), (384, 200, 2), (100, 30, 2)])
@pytest.mark.parametrize("compiled", ["off", COMPILED])
def test_attention_and_its_gradients(
    compiled: str, T: int, window: int, G: int, dtype: torch.dtype, tolerance: float
) -> None:
    """flex where it is compiled, else PyTorch's own."""
    tensors = random_qkv(2, T, 4, G, 64, dtype)
    mine = [x.to(GPU).requires_grad_() for x in tensors]
    theirs = [x.double().requires_grad_() for x in tensors]
    choose_backend(GPU, dtype, 64, 4 // G, compiled == "on")
    torch._dynamo.reset()  # one shape after the other: each compiled as the first, not for all of them
    attend = torch.compile(flash_attn_func, dynamic=False) if compiled == "on" else flash_attn_func
    out, wanted = attend(*mine, window_size=(window, 0)), reference(*theirs, window)
    assert far(out.detach(), wanted.detach()) < tolerance
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((out * weights.to(GPU, dtype)).sum(), mine)
    wanted_grads = torch.autograd.grad((wanted * weights).sum(), theirs)
    for found, grad in zip(grads, wanted_grads):
        assert far(found, grad) < tolerance


def test_prompts_of_all_lengths_compile_nothing() -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    for T in (1, 7, 63, 100, 101, 130, 257):
        q, k, v = random_qkv(1, T, 4, 2, 64, torch.float32)
        out = flash_attn_func(q.to(GPU), k.to(GPU), v.to(GPU), window_size=(50, 0))
        assert far(out, reference(q, k, v, 50)) < 1e-5
    assert not counters["stats"]


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="not Hopper")
def test_flash_attention_3() -> None:
    if fa3_kernel() is None:
        pytest.skip("FlashAttention 3 is not installed, or has no build for this torch")
    assert choose_backend(GPU, torch.bfloat16, 64, 2, compiling=False) == "fa3"
    assert choose_backend(GPU, torch.bfloat16, 64, 2, compiling=True) == "fa3"  # one graph with it
    q, k, v = random_qkv(2, 300, 4, 2, 64, torch.bfloat16)
    out = BACKENDS["fa3"](q.to(GPU), k.to(GPU), v.to(GPU), 100)
    assert far(out, reference(q, k, v, 100)) < 1e-2


# ---------------------------------------------------------------------------------------------------
# Model and optimizer


def loss_and_gradients(model: GPT, loss_fn: Any, idx: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total, losses = loss_fn(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
    total.backward()
    return {"loss": losses, **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("compiled", ["off", COMPILED])
@pytest.mark.parametrize("form", FORMS)
def test_model_as_on_the_cpu(form: str, compiled: str) -> None:
    config = FORMS[form](sequence_len=256, vocab_size=300, n_layer=4, n_head=2, n_kv_head=1, n_embd=64)
    model = randomized(config)
    idx = tokens(2, 257)
    wanted = loss_and_gradients(model, model.loss, idx)
    mine = moved(model)
    found = loss_and_gradients(mine, compiled_loss(mine, compiled, on(GPU)), idx.to(GPU))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert far(found[name], value) < (1e-5 if name == "loss" else 1e-3), name
    half = moved(model, torch.bfloat16)
    found = loss_and_gradients(half, compiled_loss(half, compiled, on(GPU, torch.bfloat16)), idx.to(GPU))
    assert far(found["loss"], wanted["loss"]) < 0.02


def curve(runtime: Runtime, steps: int = 24, compiled: str = "off", recipe: str = "", start: Any = None) -> list[float]:
    """Losses of the run whose CPU form is kept in tests/goldens."""
    model = GPT.create(GPTConfig(**SIZES), runtime.device, runtime.dtype)  # type: ignore[arg-type]
    model.load_state_dict(GPT.create(model.config, seed=5).state_dict())  # each device draws numbers of its own
    if recipe:
        fp8.convert(model, recipe, runtime)
    groups = build_param_groups(model, OptimizerConfig(), lr_scale=0.3, weight_decay=0.1, ns_dtype=torch.float32)
    schedule, loss_fn = ScheduleConfig(steps, warmup_steps=2), compiled_loss(model, compiled, runtime)
    trainer = Trainer(TrainStep(model, MuonAdamW(groups), runtime, schedule, 8, loss_fn), MarkovBatches())
    losses: list[float] = []
    trainer.log = lambda t, record: losses.append(record["loss"])
    trainer.run()
    return losses


@pytest.mark.parametrize("compiled", ["off", COMPILED])
def test_training_as_on_the_cpu(compiled: str) -> None:
    wanted = curve(on(torch.device("cpu")))
    assert curve(on(GPU), compiled=compiled) == pytest.approx(wanted, rel=1e-3)
    half = curve(on(GPU, torch.bfloat16), compiled=compiled)
    assert half == pytest.approx(wanted, rel=0.02) and half != wanted
    assert curve(on(GPU, torch.float16), compiled=compiled) == pytest.approx(wanted, rel=0.02)


def test_the_same_run_twice() -> None:
    assert curve(on(GPU, torch.bfloat16)) == curve(on(GPU, torch.bfloat16))


def three_steps(optimizer: MuonAdamW, model: GPT) -> None:
    """On gradients that are the same on every device."""
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=random).to(model.device)
        optimizer.step()


def test_update_as_on_the_cpu() -> None:
    steps: list[dict[str, torch.Tensor]] = []
    for device in (torch.device("cpu"), GPU):
        model = randomized(CONFIG).to(device)
        three_steps(MuonAdamW(build_param_groups(model, OptimizerConfig(), ns_dtype=torch.float32)), model)
        before = dict(randomized(CONFIG).named_parameters())
        steps.append({name: p.detach().cpu() - before[name].detach() for name, p in model.named_parameters()})
    for name, wanted in steps[0].items():
        assert far(steps[1][name], wanted) < 1e-3, name


# ---------------------------------------------------------------------------------------------------
# fp8, the device batch, memory


@pytest.mark.compiles
@pytest.mark.parametrize("recipe", fp8.RECIPES)
def test_fp8_trains_nearly_as_bfloat16(recipe: str) -> None:
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU of capability 8.9")
    model = moved(randomized(CONFIG), torch.bfloat16)
    idx = tokens(2, 257).to(GPU)
    wanted = loss_and_gradients(model, model.loss, idx)
    plain = model(idx[:, :256])
    fp8.convert(model, recipe, on(GPU, torch.bfloat16))
    found = loss_and_gradients(model, compiled_loss(model, "on", on(GPU, torch.bfloat16)), idx)
    for name, value in wanted.items():
        assert 0 < far(found[name], value.cpu()) < (0.05 if name == "loss" else 0.5), name
    with fp8.without_fp8(model):
        torch.testing.assert_close(model(idx[:, :256]), plain)


def test_rows_are_lowered_until_they_really_fit() -> None:
    runtime = on(GPU, torch.bfloat16)
    config = replace(CONFIG, n_embd=512, n_layer=6, vocab_size=8192)
    model = GPT.create(config, GPU, torch.bfloat16)
    groups = build_param_groups(model, OptimizerConfig(), ns_dtype=torch.bfloat16)
    step = TrainStep(model, MuonAdamW(groups), runtime, ScheduleConfig(4), 4096, model.loss)
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(4 * 2**30 / total)
    try:
        fit_device_batch(step, -1, lambda: 256)
        assert 1 <= step.device_batch_size < 4096
        held = torch.cuda.memory_allocated()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert held < 2**30 and all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------------------------------------
# Generating


@pytest.mark.parametrize("form", FORMS)
def test_answers_as_on_the_cpu(form: str) -> None:
    from stubs import TOKENIZER

    model = randomized(FORMS[form](sequence_len=64, vocab_size=265, n_layer=3, n_head=2, n_kv_head=1, n_embd=32))
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6], list(range(40))]
    engines = Engine(model.eval(), TOKENIZER), Engine(moved(model).eval(), TOKENIZER)
    answers = [
        [engine.generate_batch(prompt, max_tokens=20, temperature=0)[0] for prompt in prompts] for engine in engines
    ]
    assert answers[0] == answers[1]
    drawn = engines[1].generate_batch(prompts[0], num_samples=4, max_tokens=20, temperature=1.0, top_k=20, seed=3)
    again = engines[1].generate_batch(prompts[0], num_samples=4, max_tokens=20, temperature=1.0, top_k=20, seed=3)
    assert drawn == again and len({str(row) for row in drawn}) > 1


def twins(model: GPT, lengths: list[int], batch_size: int, max_tokens: int) -> list[KVCache]:
    """Two caches with the same rows."""
    caches = [KVCache(model.config, batch_size, max_tokens, GPU, model.compute_dtype, num_rows=0) for _ in range(2)]
    for length in lengths:
        alone = KVCache(model.config, 1, max_tokens, GPU, model.compute_dtype)
        prefill(model, alone, tokens(1, length, model.config.vocab_size, seed=length).to(GPU))
        for cache in caches:
            cache.join(alone)
    return caches


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("form", FORMS)
def test_graphs_decode_as_plain_steps(form: str, dtype: torch.dtype, tolerance: float) -> None:
    """Past every window, with rows that join and leave."""
    sizes = {"sequence_len": 700, "vocab_size": 300, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 256}
    model = DecodingWeights(moved(randomized(FORMS[form](**sizes)), dtype)).current()
    with torch.inference_mode():
        mine, other = twins(model, [3, 250, 680], 5, 700)
        decoder = GraphDecoder(model, mine)
        for step in range(60):
            if step in (15, 30):
                for cache, joining in zip((mine, other), twins(model, [340 + step], 1, 700)):
                    cache.join(joining)
            if step in (16, 45):
                for cache in (mine, other):
                    cache.leave(2 if step == 16 else 0)
            last = [(7 * step + row) % 300 for row in range(mine.num_rows)]
            assert far(decoder(last), plain_step(model, other, last).cpu()) < tolerance
            assert mine.lengths.tolist() == other.lengths.tolist()
    assert {rows for rows, _ in decoder._captured} == {3, 4} and model not in graph_decoder._plain_only


def test_graphs_change_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, in float32, while answers end and others begin; then from two replicas' threads at once."""
    from stubs import TOKENIZER

    model = moved(
        randomized(FORMS["later"](sequence_len=512, vocab_size=265, n_layer=3, n_head=2, n_kv_head=1, n_embd=64))
    )
    requests = [
        GenerationRequest(tokens(1, 5 + 40 * i, 265, seed=i)[0].tolist(), 20 + 9 * i, SamplingParams(0.0))
        for i in range(9)
    ]
    with monkeypatch.context() as patch:
        patch.setattr(graph_decoder, "EAGER_STEPS", 10**9)
        wanted = [answer.tokens for answer in Engine(model, TOKENIZER).complete(requests, 4)]
    engines = [Engine(model, TOKENIZER) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for answers in pool.map(lambda engine: engine.complete(requests, 4), engines):
            assert [answer.tokens for answer in answers] == wanted
    assert not graph_decoder._plain_only


def test_batch_after_batch_takes_no_more_memory() -> None:
    """As RL samples: each batch captures graphs of its own, in the same memory pool."""
    from stubs import TOKENIZER

    engine = Engine(moved(randomized(CONFIG), torch.bfloat16), TOKENIZER)
    reserved = []
    for _ in range(12):
        engine.generate_batch([1, 2, 3], num_samples=8, max_tokens=20, temperature=0)
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] <= reserved[2]


@pytest.mark.parametrize("kinds", [[{}], [{"temperature": 0.0}, {"top_k": 50}, {"top_p": 0.9}]], ids=["alike", "mixed"])
def test_the_host_waits_once_a_step(kinds: list[Any]) -> None:
    from stubs import TOKENIZER

    model = moved(randomized(replace(CONFIG, sequence_len=1024)), torch.bfloat16)
    batch = RunningBatch(DecodingWeights(model), ToolTable(TOKENIZER), set(), 8, 1000)
    for i in range(6):
        settings = SamplingParams(**kinds[i % len(kinds)])
        batch.submit(GenerationRequest([i + 1] * 300, 600, settings).sequences())
    for _ in range(10):
        batch.step()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(5):
                batch.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in found if "called a synchronizing" in str(w.message)]) == 5
    assert isinstance(batch.decoder, GraphDecoder) and len(batch.decoder._captured) == 1


def test_speed_of_a_decode_step_at_depth_12(capsys: pytest.CaptureFixture[str]) -> None:
    """The model alone, 520 tokens and more in the cache, all in one size of graph, against plain steps; on Hopper at
    most 2 ms a token."""
    model = DecodingWeights(GPT.create(GPTConfig(), GPU, torch.bfloat16)).current()

    def seconds(step: Callable[[list[int]], Any]) -> float:
        for _ in range(8):
            step([1] * rows)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(50):
            step([1] * rows)
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / 50

    with torch.inference_mode():
        for rows in (1, 32):
            mine, other = twins(model, [520] * rows, rows, 1024)
            decoder = GraphDecoder(model, mine)
            graph, plain = seconds(decoder), seconds(partial(plain_step, model, other))
            with capsys.disabled():
                print(f"{rows} rows: {1e3 * graph:.2f} ms with a graph, {1e3 * plain:.2f} ms without")
            assert decoder._captured and graph < plain
            assert graph < 2e-3 or rows > 1 or torch.cuda.get_device_capability() < (9, 0)


# ---------------------------------------------------------------------------------------------------
# NCCL


def test_the_update_over_nccl(tmp_path: Path) -> None:
    """In a group of one: the sums are trivial, the calls and where their tensors lie are not."""
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1, device_id=torch.device("cuda", 0)
    )
    try:
        weights = []
        for kind in (MuonAdamW, DistMuonAdamW):
            model = moved(randomized(CONFIG))
            three_steps(kind(build_param_groups(model, OptimizerConfig(), ns_dtype=torch.float32)), model)
            weights.append({name: p.detach().cpu() for name, p in model.named_parameters()})
        for name, value in weights[0].items():
            torch.testing.assert_close(weights[1][name], value, msg=name)
    finally:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------
# The scripts


def run(base: Path, *command: str, **environment: str) -> str:
    """What `python -m command` prints; it must end well."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "NANOCHAT_BASE_DIR": str(base), **environment},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.compiles
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_run_resumes(deterministic: bool, copied: Path) -> None:
    """With the same bits, or, without --deterministic, to within what a different order of sums makes of ten steps."""
    flags = [
        "--depth=2",
        "--n-embd=64",
        "--head-dim=32",
        "--max-seq-len=128",
        "--total-batch-size=1024",
        f"--data={copied / 'text.jsonl'}",
        "--eval-tokens=1024",
        "--eval-every=5",
        "--save-every=6",
        "--num-iterations=10",
        "--device-type=cuda",
        "--model-tag=run",
        "--deterministic" if deterministic else "--no-deterministic",
    ]

    def result() -> tuple[list[str], list[tuple[float, float | None]]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        files = [folder / "000010" / name for name in ("model.safetensors", "optimizer.safetensors")]
        return [sha256_file(file) for file in files], [(line["loss"], line.get("val_bpb")) for line in lines]

    folder = copied / "base_checkpoints" / "run"
    run(copied, "scripts.base_train", *flags)
    straight = result()
    shutil.rmtree(folder / "000010")
    assert "resumed at step 6 of 10" in run(copied, "scripts.base_train", *flags[:-1], "--resume")
    if deterministic:
        assert result() == straight
    else:
        losses = [[loss for loss, _ in lines] for _, lines in (result(), straight)]
        assert losses[0] == pytest.approx(losses[1], rel=0.01)
