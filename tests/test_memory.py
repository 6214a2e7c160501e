"""Memory of a training step: the planner against steps tracked tensor by tensor, and the bounds of the update."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from memory_tracker import MemoryTracker, track_step

from nanochat.gpt import GPT
from nanochat.gpt_config import GPTConfig
from nanochat.loss_head import chunk_tokens
from nanochat.optim import DistMuonAdamW, MuonAdamW, OptimizerConfig, build_param_groups
from nanochat.optimizer import update_rules
from nanochat.optimizer.update_rules import RULES, update_bytes
from nanochat.planning.hardware import GPUS
from nanochat.planning.memory import CONTEXT_BYTES, choose_rows, memory_by_kind, uncounted_weights
from nanochat.planning.planner import USABLE_MEMORY
from nanochat.recipe import get_recipe
from nanochat.scaling import derive_sizes

# ---------------------------------------------------------------------------------------------------
# The planner


@pytest.mark.parametrize(
    ("gpu", "depth", "recipe"),
    [
        ("3060", 4, "default"),
        ("3060", 12, "published"),
        ("4090", 12, "plain,matrix_rule=adamw"),
        ("h100", 12, "later"),
        ("h100", 20, "later"),  # d24 and d26: dev/LOG.md
    ],
)
def test_the_planned_batch_fits_and_needs_what_is_planned(gpu: str, depth: int, recipe: str) -> None:
    card, chosen = GPUS[gpu], get_recipe(recipe)
    config, rates = chosen.model(**vars(derive_sizes(depth))), chosen.optimizer()

    def planned(rows: int) -> int:
        return sum(memory_by_kind(config, card, 1, rows, rates).values())

    rows = choose_rows(256, lambda rows: planned(rows) <= USABLE_MEMORY * card.memory_bytes)
    tracked = track_step(config, rates, rows, torch.bfloat16, card.memory_bytes)
    peak = max(tracked.values()) + CONTEXT_BYTES
    assert peak < 0.97 * card.memory_bytes
    assert planned(rows) == pytest.approx(peak, rel=0.06)  # when written within 4%
    assert tracked["update"] < tracked["backward"]
    one_row = track_step(config, rates, 1, torch.bfloat16, card.memory_bytes)  # then the update's share is largest
    assert one_row["update"] < one_row["backward"]


def test_weights_that_are_not_counted_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanochat import gpt

    assert uncounted_weights(GPTConfig()) == uncounted_weights(GPTConfig.later()) == []

    class Gated(gpt.MLP):
        def __init__(self, config: GPTConfig) -> None:
            super().__init__(config)
            self.c_gate = gpt.Linear(config.n_embd, config.n_embd)

    monkeypatch.setattr(gpt, "MLP", Gated)
    assert uncounted_weights(GPTConfig()) == ["mlp.c_gate"]


def test_chunks_of_the_head_follow_the_card() -> None:
    tokens = {name: chunk_tokens(32768, gpu.memory_bytes) for name, gpu in GPUS.items()}
    assert tokens["3060"] == tokens["t4"] == 512 and tokens["4090"] == 1024 and tokens["h100"] == 4096
    for name, gpu in GPUS.items():
        assert 0.008 < tokens[name] * 32768 * 14 / gpu.memory_bytes < 0.025
        assert chunk_tokens(32768, 0.97 * gpu.memory_bytes) == tokens[name]  # a little less than on the data sheet


# ---------------------------------------------------------------------------------------------------
# The update


SINGLE_NUMBERS = 8 * 512  # bytes: of sums, norms and factors, in the blocks that the tracker counts


def steps(groups: list[dict[str, Any]], optimizer: MuonAdamW, device: str = "cpu") -> Iterator[MuonAdamW]:
    """The optimizer before each of its steps, with new gradients."""
    for _ in range(2):
        for p in (p for group in groups for p in group["params"]):
            p.grad = torch.randn(p.shape, device=device)
        yield optimizer


@pytest.mark.parametrize("kind", list(RULES))
@pytest.mark.parametrize("ns_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32)])
def test_temporaries_are_as_declared(kind: str, ns_dtype: torch.dtype, shape: tuple[int, int]) -> None:
    params = [torch.empty(shape, device="meta") for _ in range(7)]
    more = {"ns_dtype": ns_dtype, "row_equilibrate": True, "frobenius_snap": True} if kind == "muon" else {}
    groups = [{"kind": kind, "params": params, "lr": 0.1, "weight_decay": 0.1, **more}]
    with MemoryTracker() as tracker:
        for optimizer in steps(groups, MuonAdamW(groups), "meta"):
            before, peak = tracker.now, tracker.peak_of(optimizer.step)
    numbers = (1 if RULES[kind].elementwise else 7) * params[0].numel()
    declared, used = RULES[kind].temporary_bytes * numbers, peak - before - SINGLE_NUMBERS
    assert 0.6 * declared - SINGLE_NUMBERS < used <= 1.03 * declared and used <= 1.03 * update_bytes(groups)


def test_slices_change_no_bit_and_bound_the_temporaries(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(numbers: int) -> tuple[list[torch.Tensor], int]:
        monkeypatch.setattr(update_rules, "SLICE_NUMBERS", numbers)
        torch.manual_seed(0)
        matrices, table = [torch.randn(64, 96) for _ in range(7)], torch.randn(1000, 48)
        groups: list[dict[str, Any]] = [
            {"kind": "muon", "params": matrices, "lr": 0.1, "weight_decay": 0.1, "ns_dtype": torch.float32},
            {"kind": "adamw", "params": [table], "lr": 0.1, "weight_decay": 0.1},
        ]
        with MemoryTracker("cpu") as tracker:
            for optimizer in steps(groups, MuonAdamW(groups)):
                before, peak = tracker.now, tracker.peak_of(optimizer.step)
        assert peak - before <= 1.03 * update_bytes(groups)
        return [*matrices, table], peak - before

    whole, much = trained(2**24)
    sliced, little = trained(2 * 64 * 96)
    assert all(torch.equal(a, b) for a, b in zip(whole, sliced, strict=True))
    assert little < much / 3


def test_buffers_of_many_ranks_are_bounded_and_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 8 ranks, whose collectives a process group without communication takes part in."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    monkeypatch.setattr(update_rules, "SLICE_NUMBERS", 2 * 64 * 64)
    shapes = [(64, 64)] * 96 + [(64, 256)] * 24 + [(256, 64)] * 24
    groups: list[dict[str, Any]] = [
        {"kind": "adamw", "params": [torch.randn(1024, 64), torch.randn(1001, 63)], "lr": 0.1},
        *(
            {"kind": "muon", "params": [torch.randn(shape) for shape in shapes if shape == one], "lr": 0.1}
            for one in sorted(set(shapes))
        ),
    ]
    numbers = sum(p.numel() for group in groups for p in group["params"])
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    try:
        with MemoryTracker("cpu") as tracker:
            for optimizer in steps(groups, DistMuonAdamW(groups)):
                before, peak = tracker.now, tracker.peak_of(optimizer.step)
    finally:
        dist.destroy_process_group()
    assert 0.7 < (peak - before) / update_bytes(groups, 8) <= 1.03
    assert peak - before < 0.6 * 8 * numbers  # the matrices' gradients and new weights at once would be all of it


def test_the_rules_are_the_optimizers_own() -> None:
    """Where an optimizer is there, the search for a device batch counts its rules and not the default's."""
    config = GPTConfig.later(**vars(derive_sizes(12)))
    with torch.device("meta"):
        model = GPT(config)
    found = []
    for recipe in ("later", "later,matrix_rule=adamw"):
        rates = get_recipe(recipe).optimizer()
        groups = build_param_groups(model, rates, ns_dtype=torch.float32)
        by_groups = memory_by_kind(config, GPUS["h100"], 1, 1, param_groups=groups)
        assert by_groups == memory_by_kind(config, GPUS["h100"], 1, 1, rates)
        found.append(by_groups["optimizer"])
    assert found[1] > found[0]  # AdamW keeps two numbers of a weight, Muon one and a row


@pytest.mark.parametrize("gpu", ["3060", "4090", "h100"])
@pytest.mark.parametrize("depth", [12, 24])
def test_a_large_model_never_needs_more_for_its_update(gpu: str, depth: int) -> None:
    config = GPTConfig.later(**vars(derive_sizes(depth)))
    assert memory_by_kind(config, GPUS[gpu], 8, 1, OptimizerConfig())["update"] == 0
