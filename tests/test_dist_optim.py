"""DistMuonAdamW on several ranks compared with MuonAdamW on one: the same weights, a share of the state on each."""

from typing import Any

import pytest
import torch
from ranks import run_ranks

from nanochat.optim import DistMuonAdamW, MuonAdamW
from nanochat.optimizer import update_rules
from nanochat.runtime import Runtime

# Awkward shapes: tensors that no world size divides, fewer matrices than ranks, a scalar, one without gradients.
ADAMW = {"embedding": (37, 5), "even": (24, 4), "scalar": (1,), "lambdas": (7,), "idle": (50,), "now_and_then": (41,)}
TABLE = {"table": (43, 6)}
MUON = [[(6, 10)] * 5, [(10, 4)] * 1, [(4, 4)] * 3, [(3, 8)] * 2]
STEPS = 6


def make_params() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = {**ADAMW, **TABLE, **{f"m{g}.{i}": shape for g, group in enumerate(MUON) for i, shape in enumerate(group)}}
    return {name: torch.randn(shape, generator=random).requires_grad_() for name, shape in shapes.items()}


def make_groups(params: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    names = list(ADAMW)
    return [
        {"kind": "adamw", "params": [params[n] for n in names[:3]], "lr": 0.1, "weight_decay": 0.01},
        {"kind": "adamw", "params": [params[n] for n in names[3:]], "lr": 0.05, "betas": (0.9, 0.99)},
        {"kind": "sgd", "params": [params["table"]], "lr": 0.1},
        *(
            {
                "kind": "muon",
                "params": [params[f"m{g}.{i}"] for i in range(len(group))],
                "lr": 0.02,
                "weight_decay": 0.1,
                "ns_dtype": torch.float32,
                "row_equilibrate": bool(g % 2),
            }
            for g, group in enumerate(MUON)
        ),
    ]


def gradient(name: str, shape: tuple[int, ...], step: int, part: int) -> torch.Tensor | None:
    """One of six addends of a step's gradient; None for some tensors always, at some steps, or in some addends."""
    if name == "idle" or (name in ("now_and_then", "m2.1") and step % 2) or (name == "lambdas" and part == 5):
        return None
    seed = hash((step, part, sum(map(ord, name)))) % 2**31
    draw = torch.Generator().manual_seed(seed)
    some = torch.rand(shape[0], 1, generator=draw) < 0.1 if name in TABLE else 1  # rows that were looked up
    return torch.randn(shape, generator=draw) * some


def set_gradients(params: dict[str, torch.Tensor], step: int, parts: range) -> None:
    for name, p in params.items():
        given = [g for part in parts if (g := gradient(name, tuple(p.shape), step, part)) is not None]
        p.grad = torch.stack(given).sum(0) if given else None


def train(optimizer: MuonAdamW, params: dict[str, torch.Tensor], steps: range, parts: range) -> None:
    for step in steps:
        set_gradients(params, step, parts)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] / (1 + step)  # as a schedule would
        optimizer.step()


def on_rank(runtime: Runtime, state: Any, start: int) -> Any:
    """Train from step `start` on this rank's share of the addends: (weights, named state, elements of state held)."""
    DistMuonAdamW.SPLIT_FROM = 30
    update_rules.SLICE_NUMBERS = 100  # so groups are cut into slices, which one rank does in one piece
    params = make_params()
    optimizer = DistMuonAdamW(make_groups(params))
    names = {p: name for name, p in params.items()}
    if state:
        weights, tensors, steps = state
        for name, p in params.items():
            p.data.copy_(weights[name])
        optimizer.load_named_state(names, iter(tensors), steps)
    train(optimizer, params, range(start, STEPS), range(runtime.rank, 6, runtime.world_size))
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4
        for s in optimizer.state.values()
        for t in s.values()
        if isinstance(t, torch.Tensor)
    }
    return {n: p.detach() for n, p in params.items()}, optimizer.named_state(names), sum(held.values())


def join(states: list[Any]) -> tuple[list[tuple[str, torch.Tensor]], dict[str, int]]:
    """All ranks' named states together."""
    pieces = [item for tensors, _ in states for item in tensors.items()]
    assert len(dict(pieces)) == len(pieces), "two ranks saved the same tensor"
    return pieces, {name: step for _, steps in states for name, step in steps.items()}


@pytest.fixture(scope="module")
def straight() -> tuple[dict[str, torch.Tensor], Any]:
    """Weights and named state of one rank that gets all addends."""
    params = make_params()
    optimizer = MuonAdamW(make_groups(params))
    train(optimizer, params, range(STEPS), range(6))
    return params, optimizer.named_state({p: name for name, p in params.items()})


def assert_close(name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    error = (found - wanted.detach()).norm() / wanted.norm()
    assert error <= 1e-5, f"{name} differs by {error:.2g}"


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_many_ranks_match_one(world_size: int, straight: Any) -> None:
    ranks = run_ranks(world_size, on_rank, None, 0)
    for name, wanted in straight[0].items():
        assert_close(name, ranks[0][0][name], wanted)
        assert all(torch.equal(other[0][name], ranks[0][0][name]) for other in ranks[1:]), name
    pieces, steps = join([state for _, state, _ in ranks])
    assert steps == straight[1][1] and "idle" not in steps and steps["m2.1"] == steps["now_and_then"] == 3
    again = MuonAdamW(make_groups(params := make_params()))  # one rank loads what many saved
    names = {p: name for name, p in params.items()}
    again.load_named_state(names, pieces, steps)
    tensors, _ = again.named_state(names)
    assert tensors.keys() == straight[1][0].keys()
    for name, wanted in straight[1][0].items():
        assert_close(name, tensors[name], wanted)
    whole = sum(t.numel() for t in straight[1][0].values())
    small, rest = 2 * (1 + 7), max(numbers for *_, numbers in ranks)
    # A rank holds at most one matrix more than an even share; ranges of tensors are padded to equal length.
    assert rest <= small + (whole - small) / world_size + 60 + 10 + 2 * 4


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3), (1, 3)])
def test_state_saved_at_one_world_size_loads_at_another(before: int, after: int, straight: Any) -> None:
    if before == 1:
        optimizer = MuonAdamW(make_groups(params := make_params()))
        train(optimizer, params, range(3), range(6))
        tensors, steps = optimizer.named_state({p: name for name, p in params.items()})
        state = {n: p.detach() for n, p in params.items()}, list(tensors.items()), steps
    else:
        ranks = run_ranks(before, first_half)
        state = ranks[0][0], *join([saved for _, saved, _ in ranks])
    ends = run_ranks(after, on_rank, state, 3)
    for name, wanted in straight[0].items():
        assert_close(name, ends[0][0][name], wanted)


def first_half(runtime: Runtime) -> Any:
    globals()["STEPS"] = 3
    return on_rank(runtime, None, 0)
