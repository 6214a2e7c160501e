"""The planner against published runs, its memory against autograd, and the scaling law fit against known laws."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import refused
from ranks import run_ranks

from nanochat import gpt
from nanochat.common import UserError
from nanochat.cpu import fused
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.planning.fit import fit_law
from nanochat.planning.hardware import GPUS, Gpu, Pace, expected_pace, find_gpu, known_gpu
from nanochat.planning.law import Candidate, Law
from nanochat.planning.memory import activation_bytes, choose_rows, memory_by_kind
from nanochat.planning.planner import USABLE_MEMORY, forecast_values, plan_and_outcome
from nanochat.runtime import Runtime
from nanochat.scaling import derive_sizes, describe, estimate, make_plan, scaling_params
from nanochat.train import pace as measured, timing
from nanochat.train.build import choose_device_batch
from nanochat.train.progress import Progress
from nanochat.train.step import TrainStep
from scripts import _cli, plan

H100 = ["--gpu=h100", "--num-gpus=8"]
HERE = ["--depth=2", "--n-embd=32", "--n-head=2", "--max-seq-len=32", "--vocab-size=300", "--num-iterations=3"]


def planned(flags: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The plan, from the one line of --json."""
    capsys.readouterr()
    plan.main([*flags, "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


# ---------------------------------------------------------------------------------------------------
# Published runs on 8xH100: training time alone


@pytest.mark.parametrize(
    ("flags", "steps", "batch", "flops", "seconds"),
    [
        # The first two ran at the batch of that time, 2^19; the others at the batch that the horizon implies.
        (
            ["--depth=24", "--target-param-data-ratio=12", "--total-batch-size=524288", "--recipe=published"],
            16_704,
            2**19,
            4.3308e19,
            10_949,
        ),
        (
            ["--depth=26", "--target-param-data-ratio=8.5", "--total-batch-size=524288", "--fp8"],
            14_889,
            2**19,
            None,
            10_493,
        ),
        (["--depth=24", "--target-param-data-ratio=9.5", "--fp8"], None, 2**20, None, 2.02 * 3600),
        (["--depth=24", "--target-param-data-ratio=8", "--fp8", "--recipe=later"], None, 2**20, None, 1.65 * 3600),
    ],
    ids=["d24", "d26-fp8", "d24-fp8", "d24-fp8-later"],
)
def test_published_runs(
    flags: list[str], steps: int, batch: int, flops: float, seconds: float, capsys: pytest.CaptureFixture[str]
) -> None:
    result = planned([*H100, *flags], capsys)
    assert result["total_batch_size"] == batch and result["device_batch_size"] == 16  # as published, on 80 GB
    assert steps is None or result["steps"] == pytest.approx(steps, rel=0.01)
    assert flops is None or result["flops"] == pytest.approx(flops, rel=0.01)
    assert result["seconds"] == pytest.approx(seconds, rel=0.05)
    assert result["dollars"] == pytest.approx(result["seconds"] / 3600 * 8 * 3)


@pytest.mark.parametrize(("depth", "batch"), [(12, 2**19), (20, 2**20), (24, 2**20), (26, 2**20)])
def test_defaults_where_the_field_trains_are_the_fields(
    depth: int, batch: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The later recipe in full: rates that follow the batch alone, decay by the horizon, windows of a quarter."""
    result = planned([*H100, f"--depth={depth}"], capsys)
    assert (result["recipe"], result["measured_here"], result["total_batch_size"]) == ("later", False, batch)
    config = GPTConfig.from_dict(result["model_config"])
    assert config == GPTConfig.later(**vars(derive_sizes(depth))) and config.init == "later"
    reference = 10.5 * scaling_params(estimate(GPTConfig())[1])
    assert result["lr_scale"] == pytest.approx((batch / 2**19) ** 0.5)
    assert result["weight_decay"] == pytest.approx(0.28 * (batch / 2**19) ** 0.5 * reference / result["tokens"])
    assert result["tokens_per_param"] == pytest.approx(10.5, rel=0.001)


def test_the_plan_says_what_lies_outside_of_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--depth=2", "--head-dim=64", "--vocab-size=4096", "--max-seq-len=512", "--total-batch-size=4096"]
    assert planned([*H100, *tiny, "--num-iterations=400"], capsys)["measured_here"]
    assert not planned([*H100, *tiny, "--num-iterations=90000"], capsys)["measured_here"], "a long run of a small model"
    assert not planned([*H100, "--depth=24", "--num-iterations=1", "--total-batch-size=2048"], capsys)["measured_here"]
    size, flops = 24 * 1536**2 / (6 * 384**2), planned([*H100, "--depth=24"], capsys)["flops"] / 1e14
    shown = dict(describe_plan(["--depth=24"]))
    assert f"{size:,.1f} x the" in shown["measured here"] and f"{flops:,.1f} x the" in shown["measured here"]
    longer = dict(describe_plan([*tiny, "--num-iterations=5000"]))["measured here"]
    assert longer.startswith("no: 1.3 x the FLOPs"), "only what lies outside"
    assert dict(describe_plan([*tiny, "--num-iterations=400"]))["measured here"] == "yes"


def describe_plan(flags: list[str]) -> list[tuple[str, str]]:
    config = _cli.parse(plan.Config, [*H100, *flags])
    model_config = config.network(config.vocab_size if config.vocab_size > 0 else 32768)(config.depth)
    return describe(model_config, make_plan(model_config, **plan.horizon(config, model_config)))


def test_a_forecast_for_other_text_or_far_beyond_the_law_says_so() -> None:
    config = GPTConfig(n_layer=2, n_embd=128, n_head=2, n_kv_head=2, vocab_size=4096)
    done = Progress(step=400, val_bpb=0.74)

    def forecast(batch: int, corpus: str) -> str:
        made = make_plan(config, num_iterations=400, total_batch_size=batch)
        rows = plan_and_outcome(made, done, -1, corpus, Law.load())
        return next(row["planned"] for row in rows if row[""] == "bits per byte")

    assert "starter" in forecast(4096, "my_texts") and "starter" not in forecast(4096, "starter")
    assert "extrapolated" in forecast(2**21, "starter") and "extrapolated" not in forecast(4096, "starter")
    assert "±" in forecast(2**21, "starter") and "±" not in forecast(2**30, "starter"), "none at all that far away"


def test_every_forecast_counts_how_far_runs_lie_from_the_law() -> None:
    config = GPTConfig(n_layer=2, n_embd=128, n_head=2, n_kv_head=2, vocab_size=4096)
    made = make_plan(config, num_iterations=400, total_batch_size=4096)
    law, n, tokens = Law.load(), scaling_params(made.params), made.tokens / 2
    assert law and forecast_values(made, tokens, "my_texts", law) == {"text": "starter"}
    values = forecast_values(made, tokens, "starter", law)
    assert values["bpb"] == law.loss(n, tokens) and values["tokens"] == tokens
    scatter = float(np.std([loss / law.loss(*point) - 1 for *point, loss in law.points]))
    assert values["error"] ** 2 == pytest.approx(law.loss_error(n, tokens) ** 2 + (scatter * values["bpb"]) ** 2)
    assert f"± {values['error']:.4f}" in str(law.forecast(n, tokens)), "in the table of the report and in the plan too"
    assert forecast_values(made, 2**50, "starter", law) == forecast_values(made, tokens, "starter", None) == {}


def test_d12_takes_about_five_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    # The same rule at half the width. Published as "about 5 minutes".
    assert 4 * 60 < planned([*H100, "--depth=12"], capsys)["seconds"] < 6 * 60


def test_json_output(capsys: pytest.CaptureFixture[str]) -> None:
    result = planned([*H100, "--depth=24", "--n-embd=1024", "--n-head=8"], capsys)
    assert result["num_params"] == pytest.approx(8e8, rel=0.05)  # published as "about 800M"
    assert (
        result["memory_bytes"] == sum(result["memory"].values()) <= USABLE_MEMORY * result["memory_available_bytes"]
        and result["fits"]
    )
    assert result["steps"] * result["total_batch_size"] == result["tokens"]
    rows = result["total_batch_size"] // 2048
    assert result["device_batch_size"] * result["grad_accum_steps"] * 8 == rows
    assert result["forecast_bpb"] is None or 0.5 < result["forecast_bpb"] < 1.5


def test_table_output(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main([*H100, "--depth=12"])
    out = capsys.readouterr().out
    assert all(word in out for word in ("steps", "activations", "cost", "GPU hour", "- memory:"))


# ---------------------------------------------------------------------------------------------------
# Machines and flags


def test_every_preset_plans(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {
        name: planned(["--depth=4", f"--gpu={name.upper()}", "--device-batch-size=1"], capsys)["seconds"]
        for name in GPUS
    }
    order = ["b200", "h200", "h100", "a100", "4090", "v100", "l4", "3090", "t4", "4060"]
    assert sorted(order, key=lambda name: seconds[name]) == order


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", None),
        ("NVIDIA GeForce RTX 3060", "3060"),
        ("NVIDIA GeForce RTX 3060 Ti", None),
        ("NVIDIA GeForce RTX 5090", "5090"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "6000-ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "pro-6000"),
        ("Quadro RTX 6000", None),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("Tesla P100-PCIE-16GB", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_gpus_by_their_product_names(name: str, preset: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = known_gpu(Runtime(torch.device("cuda"), torch.bfloat16, "test", seed=0))
    assert (found and found.name) == preset
    assert known_gpu(Runtime(torch.device("cpu"), torch.bfloat16, "test", seed=0)) is None


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H100 PCIe", torch.float32, 1.0),
        ("Tesla T4", torch.float16, 65e12),
        ("NVIDIA GeForce RTX 3060 Ti", torch.bfloat16, 1.0),
    ],
)
def test_share_of_peak_is_of_the_data_sheet(
    name: str, dtype: torch.dtype, peak: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(timing, "measure_peak_flops", lambda runtime: 1.0)
    found, source = timing.reference_peak(Runtime(torch.device("cuda"), dtype, "test", seed=0))
    assert found == pytest.approx(peak) and ("measured" in source) == (peak == 1.0)


def test_narrow_models_reach_less_of_the_peak() -> None:
    def share(depth: int) -> float:
        sizes = derive_sizes(depth)
        config = GPTConfig(n_layer=depth, n_embd=sizes.n_embd, n_head=sizes.n_head, n_kv_head=sizes.n_kv_head)
        return estimate(config)[0] / expected_pace(config, GPUS["h100"]).token_seconds / GPUS["h100"].peak_flops

    assert share(4) < share(12) < share(24) < share(40) < 0.6


def test_minutes_fix_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    result = planned([*H100, "--depth=12", "--minutes=10", "--target-param-data-ratio=-1"], capsys)
    assert result["total_batch_size"] == 2**19 and result["horizon"] == "--minutes=10"
    assert result["seconds"] == pytest.approx(600 * 0.93, rel=0.01)


def test_steps_beside_minutes_are_of_the_batch_of_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    """As in base_train."""
    flags = [*H100, "--depth=24", "--num-iterations=100"]
    assert planned(flags, capsys)["total_batch_size"] == 2**20
    result = planned([*flags, "--minutes=30"], capsys)
    assert (result["steps"], result["total_batch_size"]) == (100, 2**19)


def test_a_model_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--depth=40", "--gpu=3090", "--num-iterations=1"]
    result = planned(flags, capsys)
    assert not result["fits"] and result["device_batch_size"] == 1 and "1 row" in " ".join(result["assumptions"])
    plan.main(flags)
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(("context", "rows"), [(2048, 32), (1024, 64)])
def test_no_more_rows_than_training_begins_with(context: int, rows: int, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--depth=12", "--gpu=h200", f"--max-seq-len={context}"]
    assert planned(flags, capsys)["device_batch_size"] == rows
    runtime = Runtime(torch.device("cuda"), torch.bfloat16, "test", seed=0)
    assert choose_device_batch(-1, 2**10, context, runtime) == rows


def test_device_batch_and_price_flags(capsys: pytest.CaptureFixture[str]) -> None:
    result = planned([*H100, "--depth=24", "--device-batch-size=8", "--dollars-per-gpu-hour=2"], capsys)
    assert (result["device_batch_size"], result["grad_accum_steps"]) == (8, 8)
    assert result["dollars"] == pytest.approx(result["seconds"] / 3600 * 8 * 2)


@pytest.mark.parametrize(("step_rows", "max_rows", "chosen"), [(32, None, 16), (32, 4, 4), (12, None, 4), (7, None, 1)])
def test_rows_divide_the_step(step_rows: int, max_rows: int | None, chosen: int) -> None:
    assert choose_rows(step_rows, lambda rows: rows <= 16, max_rows) == chosen


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--gpu=abacus"], "h100"),
        (["--gpu=a100", "--fp8"], "fp8"),
        (["--fp8"], "--gpu=h100"),
        (["--gpu=h100", "--num-gpus=0"], "--num-gpus"),
        (["--num-gpus=1000"], "--num-gpus=1000"),
        (["--gpu=h100", "--depth=0"], "--depth"),
        (["--gpu=h100", "--depth=-1", "--minutes=30"], "--gpu"),
        (["--depth=-1"], "--minutes"),
        (["--gpu=h100", "--n-embd=100"], "--head-dim"),
        (["--gpu=h100", "--recipe=new"], "--recipe"),
        (["--gpu=h100", "--max-seq-len=0"], "--max-seq-len"),
        (["--gpu=h100", "--vocab-size=0"], "vocab_size"),
        (["--gpu=h100", "--device-batch-size=0"], "--device-batch-size"),
        (["--gpu=h100", "--num-iterations=0"], "--num-iterations"),
        (["--gpu=h100", "--target-param-data-ratio=-1"], "--target-param-data-ratio"),
        (["--gpu=h100", "--dollars-per-gpu-hour=-3"], "--dollars-per-gpu-hour"),
    ],
)
def test_wrong_flags(flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(plan.main, flags, capsys)  # type: ignore[arg-type]


def test_fp16_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    result = planned(["--gpu=t4", "--depth=4"], capsys)
    assert result["dtype"] == "float16" and "NANOCHAT_DTYPE" in " ".join(result["assumptions"])
    assert find_gpu("T4").element_bytes == 2


def test_the_rule_and_fp8_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*H100, "--depth=12", "--recipe=default,matrix_rule=adamw", "--fp8"]
    muon, adamw = planned([*H100, "--depth=12"], capsys), planned(flags, capsys)
    matrices = 12 * 12 * 768**2  # AdamW keeps one number more of each
    assert adamw["memory"]["optimizer"] - muon["memory"]["optimizer"] == pytest.approx(4 * matrices / 8, rel=0.01)
    assert any("fp8" in sentence and "memory" in sentence for sentence in adamw["assumptions"])


# ---------------------------------------------------------------------------------------------------
# This machine


def test_this_machine_is_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "MEASURING_SECONDS", 1.0)
    result = planned([*HERE, "--total-batch-size=1024"], capsys)
    assert result["steps"] == 3 and result["seconds"] > 0 and result["dollars"] is None
    assert any("with all layers" in sentence for sentence in result["assumptions"])
    assert result["memory_bytes"] < result["memory_available_bytes"]


def test_a_learnable_gain_is_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The FLOPs of an update count the matrices of a changed model too, and only those."""
    config = GPTConfig(sequence_len=64, n_layer=2)
    before = measured.update_flops(config)

    class Gained(gpt.Block):
        def __init__(self, config: GPTConfig, layer: int) -> None:
            super().__init__(config, layer)
            self.gain = torch.nn.Parameter(torch.ones(8))

    monkeypatch.setattr(gpt, "Block", Gained)
    assert measured.update_flops(config) == before > 0


def test_a_model_too_slow_to_measure_is_scaled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPTConfig(sequence_len=1024, n_layer=8)
    tried = list(measured.trials(config, 4))
    assert [(c.n_layer, c.sequence_len, rows) for c, rows in tried] == [
        (8, 1024, 4),
        (8, 1024, 1),
        (8, 512, 1),
        (8, 256, 1),
        (4, 256, 1),
        (2, 256, 1),
        (1, 256, 1),
    ]
    monkeypatch.setattr(measured, "time_step", lambda trial, rows, *_: (float(rows), 1.0))
    slow = measured.Gpu("abacus", 1e12, 1e9, None, 0.0, None, "float32")
    pace = measured.measure_pace(
        GPTConfig(sequence_len=64, vocab_size=64, n_layer=4, n_embd=64, n_head=2, n_kv_head=2),
        slow,
        Runtime.create("cpu"),
    )
    assert pace.token_seconds == pytest.approx(1 / 64)  # all of it could be measured: 4096 // 64 rows in 64 s
    slow.peak_flops = 1e3
    pace = measured.measure_pace(config, slow, Runtime.create("cpu"))
    assert "40%" in pace.source and pace.token_seconds == pytest.approx(estimate(config)[0] / 400)


def test_available_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    assert measured.available_memory(str(tmp_path / "meminfo")) == 2**21
    assert measured.available_memory(str(tmp_path / "none")) > 2**20
    (tmp_path / "other").write_text("MemTotal: 9 kB\n")
    assert measured.available_memory(str(tmp_path / "other")) > 2**20
    monkeypatch.setattr(measured, "memory_bytes", lambda: 2**20)  # the limit of a container
    assert measured.available_memory(str(tmp_path / "meminfo")) == 2**20


def test_a_known_gpu_of_this_machine_has_its_price(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**36, 2**37))
    gpu = measured.this_machine(Runtime(torch.device("cuda"), torch.bfloat16, "test", seed=0))
    assert gpu.dollars_per_hour == GPUS["h100"].dollars_per_hour and gpu.memory_bytes == 2**36


def test_the_machine_is_measured_once_to_choose_a_depth(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks = []
    monkeypatch.setattr(measured, "reference_peak", lambda runtime: peaks.append(1e12) or (1e12, "test"))
    for module in (measured, plan):
        monkeypatch.setattr(module, "measure_pace", lambda *given: Pace(1e-3, 0.01, "test"))
    result = planned(["--depth=-1", "--minutes=1", "--max-seq-len=64", "--vocab-size=300"], capsys)
    assert result["model_config"]["n_layer"] >= 2 and len(peaks) == 3


# ---------------------------------------------------------------------------------------------------
# Memory against reality


def saved_bytes(config: GPTConfig, rows: int, dtype: torch.dtype) -> int:
    """Bytes of the tensors that autograd saves in a forward pass, each storage once, without the parameters."""
    model = GPT.create(config, compute_dtype=dtype)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}  # held, so that no address is reused

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    tokens = torch.randint(config.vocab_size, (rows, config.sequence_len + 1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)


SHAPES = [
    {"n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 128, "sequence_len": 256},
    {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 128, "sequence_len": 512},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "form",
    [
        GPTConfig,
        GPTConfig.later,
        GPTConfig.small,
        GPTConfig.plain,
        functools.partial(GPTConfig.plain, ngram_rows=97),
    ],
)
@pytest.mark.parametrize(("kernels", "dtype"), [(True, torch.float32), (True, torch.bfloat16), (False, torch.float32)])
def test_activation_bytes_equal_those_autograd_saves(
    kernels: bool, dtype: torch.dtype, form: Any, shape: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the C kernels the operations are those of a GPU, so this checks the formula for GPUs.
    if not kernels:
        monkeypatch.setattr(fused, "usable", lambda *tensors: False)
    elif not fused.usable(torch.zeros(1)):
        pytest.skip("no C compiler here")
    config, element = form(vocab_size=512, **shape), torch.finfo(dtype).bits // 8
    counts = estimate(config)[1]
    casts = 0 if element == 4 else element * counts["transformer_matrices"]
    measured = saved_bytes(config, 2, dtype) - casts - 4 * counts["lm_head"]  # the head saves its gradient
    # Within 5% when written; 8% is good enough for a planner that leaves a tenth free.
    assert activation_bytes(config, 2, element, fused=kernels, blocked=True) == pytest.approx(measured, rel=0.08)


def test_optimizer_bytes_equal_the_state_kept(tiny_model: GPT) -> None:
    from nanochat.optim import MuonAdamW, OptimizerConfig, build_param_groups

    optimizer = MuonAdamW(build_param_groups(tiny_model, OptimizerConfig(), ns_dtype=torch.float32))
    for p in tiny_model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    tensors, _ = optimizer.named_state({p: name for name, p in tiny_model.named_parameters()})
    memory = memory_by_kind(tiny_model.config, GPUS["h100"], 1, 1)
    assert memory["optimizer"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert memory["weights"] == sum(4 * p.numel() for p in tiny_model.parameters())
    assert memory_by_kind(tiny_model.config, GPUS["h100"], 8, 1)["optimizer"] == math.ceil(memory["optimizer"] / 8)


def held_by_rank(runtime: Runtime, dtype: str) -> tuple[dict[str, int], dict[str, int]]:
    """(planned, measured) bytes of this rank by kind, and the peak during a backward pass."""
    from torch.autograd.profiler import profile  # torch.profiler.profile imports the compiler

    from bench._common import tensor_bytes
    from nanochat.train.build import make_optimizer, random_batch
    from nanochat.train.config import TrainConfig
    from nanochat.train.schedules import ScheduleConfig
    from nanochat.train.step import TrainStep

    config = GPTConfig.later(vocab_size=512, **{**SHAPES[0], "n_layer": 4})
    runtime.dtype, rows = getattr(torch, dtype), 2
    model = GPT.create(config, compute_dtype=runtime.dtype)
    optimizer = make_optimizer(model, TrainConfig().optimizer_config("default"), runtime, 1e-3, 0.1)
    step = TrainStep(model, optimizer, runtime, ScheduleConfig(9), rows, model.loss)
    batch = random_batch(2 * rows * runtime.world_size, config.sequence_len, config.vocab_size, runtime)
    step(batch)
    with profile(profile_memory=True, use_kineto=True) as profiler:
        step.accumulate(batch)  # two micro-batches, the second one beside the gradients of the first
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    held = {
        "weights": tensor_bytes(model.parameters()),
        "gradients": tensor_bytes(p.grad for p in model.parameters()),
        "optimizer": tensor_bytes(t for state in optimizer.state.values() for t in state.values()),
    }
    held["at the peak"] = held["weights"] + held["optimizer"] + peak
    plan = memory_by_kind(config, Gpu("", 0.0, 1.0, None, 0.0, None, dtype, "cpu"), runtime.world_size, rows)
    return {**plan, "at the peak": sum(plan.values())}, held


@pytest.mark.parametrize(("world_size", "dtype"), [(1, "float32"), (2, "bfloat16"), (4, "float32")])
def test_memory_of_each_rank_is_as_planned(world_size: int, dtype: str) -> None:
    """When written: weights, gradients and optimizer within 0.02% of the plan, the peak 3.5% above it."""
    if not fused.usable(torch.zeros(1)):
        pytest.skip("no C compiler here")
    for planned_bytes, held in run_ranks(world_size, held_by_rank, dtype):
        for kind, size in held.items():
            assert size == pytest.approx(planned_bytes[kind], rel=0.10), kind


# ---------------------------------------------------------------------------------------------------
# The law

TRUE = Law(N0=2e7, alpha=0.09, D0=8e8, beta=0.14)


def noisy_runs(seed: int, noise: float = 0.002) -> list[tuple[float, float, float]]:
    """Sixteen runs of that law, four sizes by four token counts; 0.2% of noise, as between equal runs."""
    rng = np.random.default_rng(seed)
    return [
        (n, n * ratio, TRUE.loss(n, n * ratio) * math.exp(rng.normal(0, noise)))
        for n in (1e6, 4e6, 16e6, 64e6)
        for ratio in (4, 10, 30, 90)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_fit_recovers_the_law(seed: int) -> None:
    points = noisy_runs(seed)
    if seed % 2:
        n, d, loss = points[3]
        points[3] = (n, d, loss * 1.3)  # an outlier
    law = fit_law(points)
    assert law.alpha == pytest.approx(TRUE.alpha, abs=0.03) and law.beta == pytest.approx(TRUE.beta, abs=0.03)
    assert law.loss(16e6, 2e8) == pytest.approx(TRUE.loss(16e6, 2e8), rel=0.003)
    far = 6.4e8, 1.2e10  # ten times the largest model
    assert law.loss(*far) == pytest.approx(TRUE.loss(*far), rel=0.01)
    error = law.loss_error(*far)
    assert abs(law.loss(*far) - TRUE.loss(*far)) < 4 * error < 0.2
    assert 0 < law.errors["alpha"] < 0.05


def test_fit_without_noise_is_exact() -> None:
    law = fit_law(noisy_runs(0, noise=0.0), num_resamples=2)
    assert law.parameters == pytest.approx(TRUE.parameters, rel=1e-3)


def test_best_of_a_budget() -> None:
    def flat(n: float) -> Candidate:
        return Candidate(int(n), 6 * n)

    candidates = {i: flat(1e6 * 1.2**i) for i in range(40)}
    choice = TRUE.best(lambda key: 1e17, candidates)
    # At the optimum for 6ND FLOPs another parameter and another token are worth the same.
    n, d = candidates[choice.key].params, choice.tokens
    power = TRUE.alpha / TRUE.beta
    assert power * (TRUE.N0 / n) ** power == pytest.approx(TRUE.D0 / d, rel=0.2)
    assert d == pytest.approx(1e17 / 6 / n) and choice.loss == TRUE.loss(n, d)
    # If wide models run slower, the best model for the same time is smaller.
    assert TRUE.best(lambda key: 1e17 / 1.2**key, candidates).key < choice.key


def test_law_on_disk_and_in_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "law.json"
    assert Law.load(path) is None
    law = fit_law(noisy_runs(0), corpus="starter", num_resamples=5)
    law.save(path)
    assert Law.load(path) == law
    (tmp_path / "bad.json").write_text('{"N0": 1}')
    with pytest.raises(UserError, match=r"bad\.json"):
        Law.load(tmp_path / "bad.json")
    monkeypatch.setattr(plan.Law, "load", lambda: law)
    result = planned([*H100, "--depth=24"], capsys)
    assert result["forecast_bpb"] == law.loss(result["scaling_params"], result["tokens"])
    extrapolation = result["scaling_params"] * result["tokens"] / max(n * d for n, d, _ in law.points)
    (basis,) = (sentence for sentence in result["assumptions"] if sentence.startswith("loss:"))
    assert "16 runs on starter" in basis and f"{extrapolation:.3g} times" in basis


@pytest.mark.parametrize("points", [noisy_runs(0)[:5], [(1e6, d, 1.0) for d in range(1, 9)], [(1e6, 1e7, 0.0)] * 9])
def test_too_few_runs_for_a_law(points: list[tuple[float, float, float]]) -> None:
    with pytest.raises(UserError, match=r"scaling law needs .*(6 runs|above 0)"):
        fit_law(points)


def test_every_rank_times_whole_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a trial are each rank's, whatever their number."""
    seen = []
    alone = Runtime.create("cpu")
    rank = Runtime(alone.device, alone.dtype, "", 0, rank=1, local_rank=1, world_size=4)
    monkeypatch.setattr(rank, "all_reduce_max", lambda value, name: value)
    monkeypatch.setattr("nanochat.train.build.DistMuonAdamW", MuonAdamW)
    monkeypatch.setattr(TrainStep, "accumulate", lambda self, batch: seen.append(batch.inputs.shape))
    config = GPTConfig(sequence_len=16, vocab_size=64, n_layer=1, n_embd=32, n_head=1, n_kv_head=1)
    measured.time_step(config, 3, rank, 1.0)
    assert set(seen) == {(3, 16)}
