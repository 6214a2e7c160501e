"""MuonAdamW against the published implementation, torch.optim, the singular value decomposition and worked examples."""

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load, load_file, save
from stubs import stir

from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, OptimizerConfig, build_param_groups, even_out, orthogonalize
from nanochat.optimizer import update_rules
from nanochat.optimizer.update_rules import RULES, UpdateRule, optimizer_bytes
from nanochat.recipe import get_recipe
from nanochat.train.schedules import ScheduleConfig

EXACT: dict[str, Any] = {"ns_dtype": torch.float32, "row_equilibrate": True, "frobenius_snap": True}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def muon(params: list[torch.Tensor], lr: float = 0.1, **settings: Any) -> MuonAdamW:
    return MuonAdamW([{"kind": "muon", "params": params, "lr": lr, **settings}])


# ---------------------------------------------------------------------------------------------------
# The published implementation


@pytest.mark.parametrize(
    "form, tolerance, settings",
    [
        ("published", 0.1, {"ns_dtype": torch.bfloat16}),  # the published form rounds more often
        ("later", 3e-3, {**EXACT, "ns_safety": 1.01}),
    ],
)
def test_golden_steps(goldens: Path, form: str, tolerance: float, settings: dict[str, Any]) -> None:
    facts = json.loads((goldens / f"model_{form}.json").read_text(encoding="utf-8"))
    tensors, weights = load_file(goldens / f"optim_{form}.safetensors"), load_file(goldens / f"gpt_{form}.safetensors")
    params: dict[str, torch.nn.Parameter] = {}
    groups = []
    for group in facts["groups"]:
        names = group.pop("names")
        for name in names:  # of embeddings and head only the first rows: AdamW goes element by element
            params[name] = torch.nn.Parameter(weights[f"w.{name}"][: len(tensors[f"grad0.{name}"])].clone())
        groups.append({**group, "params": [params[n] for n in names], **(settings if group["kind"] == "muon" else {})})
    optimizer = MuonAdamW(groups)
    compared = 0
    for step in range(3):
        before = {name: p.detach().clone() for name, p in params.items()}
        for name, p in params.items():
            p.grad = tensors.get(f"grad{step}.{name}")
        optimizer.step()
        for name, p in params.items():
            wanted = tensors.get(f"after{step}.{name}")
            if wanted is None:
                assert torch.equal(p, before[name])  # no gradient, no step
                continue
            error = (p.detach() - wanted).norm() / (wanted - before[name]).norm()
            assert error < (tolerance if p.dim() == 2 and "transformer.h" in name else 1e-4), (name, step, error)
            with torch.no_grad():
                p.copy_(wanted)  # so that each step is judged alone
            compared += 1
    assert compared == len(params) * 3 - 4


# ---------------------------------------------------------------------------------------------------
# AdamW


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.8, 0.95), (0.96, 0.995)])
def test_adamw_follows_torch(weight_decay: float, betas: tuple[float, float]) -> None:
    mine, theirs = random(5, 3).requires_grad_(), random(5, 3).requires_grad_()
    settings: dict[str, Any] = {"lr": 0.05, "betas": betas, "eps": 1e-10, "weight_decay": weight_decay}
    optimizers = MuonAdamW([{"kind": "adamw", "params": [mine], **settings}]), torch.optim.AdamW([theirs], **settings)
    for step in range(8):
        mine.grad = random(5, 3, seed=step + 1) * 10.0 ** (step - 4)
        theirs.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.05 / (step + 1)  # schedules move it
            optimizer.step()
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("slice_numbers", [2**24, 64])
def test_sgd_divides_by_the_size_of_an_average_number(slice_numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were not looked up neither move nor count; a gradient that is 0 everywhere moves nothing."""
    monkeypatch.setattr(update_rules, "SLICE_NUMBERS", slice_numbers)
    draw = torch.Generator().manual_seed(5)
    p = torch.randn(50, 6, generator=draw)
    optimizer = MuonAdamW([{"kind": "sgd", "params": [p], "lr": 0.1, "weight_decay": 0.1}])
    for size in (1.0, 1e-7, 0.0, 1e5):
        grad = size * torch.randn(50, 6, generator=draw) * (torch.rand(50, 1, generator=draw) < 0.3)
        numbers = grad[grad != 0].double()
        average = (numbers.square().sum() / numbers.abs().sum()).item() if size else 1.0
        expected = p.double() * (1 - 0.01) - 0.1 * grad.double() / average
        p.grad = grad
        optimizer.step()
        torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-6)
    assert optimizer.named_state({p: "p"}) == ({}, {"p": 4})


def test_state_of_another_rule_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """As of a run whose table of n-grams was updated by Adam."""
    p = torch.ones(2, 3)
    for kind, warned in (("sgd", True), ("adamw", False)):
        state = {f"{name}.table": torch.zeros(2, 3) for name in ("exp_avg", "exp_avg_sq")}
        MuonAdamW([{"kind": kind, "params": [p], "lr": 0.1}]).load_named_state({p: "table"}, state, {"table": 3})
        assert ("exp_avg.table" in capsys.readouterr().err) == warned


def test_adamw_keeps_fp32_state_for_bf16_parameters() -> None:
    p = random(4, 4).bfloat16().requires_grad_()
    optimizer = MuonAdamW([{"kind": "adamw", "params": [p], "lr": 0.1}])
    p.grad = random(4, 4, seed=1).bfloat16()
    optimizer.step()
    assert p.dtype == torch.bfloat16 and p.isfinite().all()
    assert optimizer.state[p]["exp_avg"].dtype == optimizer.state[p]["exp_avg_sq"].dtype == torch.float32


def test_parameter_without_gradient_is_left_alone() -> None:
    a, b, c, d = (random(2, 2, seed=i).requires_grad_() for i in range(4))
    groups = [{"kind": "adamw", "params": [a, b], "lr": 0.1}, {"kind": "muon", "params": [c, d], "lr": 0.1}]
    optimizer = MuonAdamW(groups)
    before = [x.detach().clone() for x in (a, b, c, d)]
    a.grad, c.grad = torch.ones(2, 2), torch.ones(2, 2)  # d has none, so its whole stack waits
    optimizer.step()
    assert not torch.equal(a, before[0])
    assert all(torch.equal(x, y) for x, y in zip((b, c, d), before[1:]))


# ---------------------------------------------------------------------------------------------------
# Muon


@pytest.mark.parametrize("rows, columns", [(16, 16), (8, 32), (48, 12), (1, 7), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_keeps_singular_vectors_and_evens_out_values(rows: int, columns: int, dtype: torch.dtype) -> None:
    x = random(3, rows, columns, seed=rows)
    out = orthogonalize(x, dtype=dtype)
    assert out.dtype == dtype and out.shape == x.shape
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    turned = u.mT @ out.double() @ vt.mT  # diagonal if the singular vectors are the same
    values = turned.diagonal(dim1=-2, dim2=-1)
    known = s / s.norm(dim=-1, keepdim=True) > 3e-3  # smaller ones are still on their way up after five steps
    slack = 0.0 if dtype == torch.float32 else 0.05
    assert (values[known] > 0.7 - slack).all() and (values < 1.25 + slack).all()
    off = turned - torch.diag_embed(values)
    assert off.abs().max() < (1e-4 if dtype == torch.float32 else 0.1)


def test_orthogonalize_ignores_scale_and_survives_zeros() -> None:
    x = random(2, 6, 10)
    torch.testing.assert_close(
        orthogonalize(x * 1e6, dtype=torch.float32), orthogonalize(x, dtype=torch.float32), rtol=1e-3, atol=1e-4
    )
    assert (orthogonalize(torch.zeros(1, 4, 4)) == 0).all()


def test_even_out_keeps_the_norm_and_levels_the_neurons() -> None:
    update = random(2, 6, 4) * torch.arange(1, 7)[:, None]  # rows of very different size
    second = torch.zeros(2, 6, 1)
    out = even_out(update, second, beta2=0.0)  # no memory: the present RMS alone
    torch.testing.assert_close(out.norm(dim=(1, 2)), update.norm(dim=(1, 2)))
    rms = out.square().mean(-1)
    torch.testing.assert_close(rms, rms.mean(-1, keepdim=True).expand_as(rms))
    torch.testing.assert_close(second, update.square().mean(-1, keepdim=True))
    wide = even_out(update.mT, torch.zeros(2, 1, 6), beta2=0.0)
    torch.testing.assert_close(wide, out.mT)


def test_second_moment_is_an_average_over_steps() -> None:
    second = torch.zeros(1, 2, 1)
    for _ in range(2):
        even_out(torch.full((1, 2, 2), 3.0), second, beta2=0.75)
    torch.testing.assert_close(second, torch.full((1, 2, 1), 9 * (1 - 0.75**2)))


def test_cautious_decay_worked_example() -> None:
    """On 1 x 1 matrices the orthogonal update is the gradient's sign, so every step can be done by hand."""
    lr, decay = 0.1, 0.5
    cases = [
        (2.0, 3.0, 2 - lr - lr * decay * 2),  # the update shrinks the weight: decay joins in
        (2.0, -3.0, 2 + lr),  # it grows the weight: no decay
        (-2.0, -0.1, -2 + lr + lr * decay * 2),
        (-2.0, 0.1, -2 - lr),
    ]
    for start, grad, wanted in cases:
        p = torch.tensor([[start]], requires_grad=True)
        optimizer = muon([p], lr, weight_decay=decay, **EXACT)
        p.grad = torch.tensor([[grad]])
        optimizer.step()
        assert p.item() == pytest.approx(wanted, abs=1e-5)


def test_tall_matrices_step_further() -> None:
    """The update of an R x C matrix has Frobenius norm lr * sqrt(max(1, R/C)) * sqrt(min(R, C))."""
    for rows, columns in ((8, 2), (2, 8), (4, 4)):
        p = torch.zeros(rows, columns, requires_grad=True)
        p.grad = random(rows, columns)
        muon([p], 0.1, **EXACT).step()
        wanted = 0.1 * math.sqrt(max(1, rows / columns)) * math.sqrt(min(rows, columns))
        assert p.detach().norm().item() == pytest.approx(wanted, rel=1e-4)


def test_momentum_is_nesterovs() -> None:
    """1 x 1 gradients by hand: the step has the sign of g + momentum * (average - g), at momentum 0.9."""
    cases = [
        ((10.0, -1.0), 1, 0.8),  # the average outweighs the gradient: 0.9 * 0.8 - 0.1 > 0
        ((1.333, -1.0), -1, 0.01997),  # the average is still positive, but looking ahead is not
    ]
    for grads, sign, average in cases:
        p = torch.zeros(1, 1, requires_grad=True)
        optimizer = muon([p], 0.1, momentum=0.9, **EXACT)
        for grad in grads:
            before, p.grad = p.item(), torch.tensor([[grad]])
            optimizer.step()
        assert before - p.item() == pytest.approx(0.1 * sign, rel=1e-3)
        assert optimizer.state[p]["momentum_buffer"].item() == pytest.approx(average, rel=1e-4)


@pytest.mark.parametrize("shape", [(6, 6), (4, 10), (10, 4)])
@pytest.mark.parametrize("settings", [{"ns_dtype": torch.float32}, {**EXACT, "weight_decay": 0.1}])
def test_stacked_matrices_step_as_if_alone(shape: tuple[int, int], settings: dict[str, Any]) -> None:
    together, alone = ([random(*shape, seed=i).requires_grad_() for i in range(3)] for _ in range(2))
    optimizers = [muon(together, **settings), *(muon([p], **settings) for p in alone)]
    for step in range(3):
        for i, (a, b) in enumerate(zip(together, alone)):
            a.grad = random(*shape, seed=10 * step + i)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(together, alone):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_muon_group_of_two_shapes_is_refused() -> None:
    with pytest.raises(AssertionError, match="shape"):
        muon([torch.zeros(2, 3), torch.zeros(3, 2)])
    with pytest.raises(AssertionError, match="no_such_rule"):
        MuonAdamW([{"kind": "no_such_rule", "params": [torch.zeros(1)], "lr": 0.1}])


# ---------------------------------------------------------------------------------------------------
# Saving


SHAPES = {"embedding": (5, 3), "scalar": (1,), "a": (4, 6), "b": (4, 6), "tall": (6, 2)}


class Run:
    """Parameters of both kinds and their optimizer, stepped on a fixed sequence of gradients."""

    def __init__(self) -> None:
        self.params = {n: random(*s, seed=i).requires_grad_() for i, (n, s) in enumerate(SHAPES.items())}
        p = self.params
        self.names = {tensor: name for name, tensor in p.items()}
        self.optimizer = MuonAdamW(
            [
                {"kind": "adamw", "params": [p["embedding"], p["scalar"]], "lr": 0.1, "weight_decay": 0.01},
                {"kind": "muon", "params": [p["a"], p["b"]], "lr": 0.02, "weight_decay": 0.1},
                {"kind": "muon", "params": [p["tall"]], "lr": 0.02},
            ]
        )

    def steps(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            for i, p in enumerate(self.params.values()):
                p.grad = random(*p.shape, seed=100 * step + i)
            self.optimizer.step()


@pytest.mark.parametrize("cut", [1, 3])
def test_saved_and_loaded_run_continues_exactly(cut: int) -> None:
    straight, first, second = Run(), Run(), Run()
    straight.steps(0, 6)
    first.steps(0, cut)
    tensors, counts = first.optimizer.named_state(first.names)
    on_disk = save({k: v.contiguous() for k, v in tensors.items()})
    counts = json.loads(json.dumps(counts))
    for name, p in second.params.items():
        p.data.copy_(first.params[name].data)
    first.steps(cut, 6)  # saving must not disturb what goes on
    second.optimizer.load_named_state(second.names, load(on_disk), counts)
    second.steps(cut, 6)
    for run in (first, second):
        assert all(torch.equal(run.params[n], straight.params[n]) for n in SHAPES)
    ends = [run.optimizer.named_state(run.names) for run in (straight, second)]
    assert ends[0][1] == ends[1][1] == dict.fromkeys(SHAPES, 6)
    assert ends[0][0].keys() == ends[1][0].keys()
    assert all(torch.equal(ends[0][0][k], ends[1][0][k]) for k in ends[0][0])


def test_saved_state_is_full_shape_and_named() -> None:
    run = Run()
    assert run.optimizer.named_state(run.names) == ({}, {})
    run.steps(0, 1)
    tensors, counts = run.optimizer.named_state(run.names)
    assert {k: tuple(v.shape) for k, v in tensors.items()} == {
        "exp_avg.embedding": (5, 3),
        "exp_avg_sq.embedding": (5, 3),
        "exp_avg.scalar": (1,),
        "exp_avg_sq.scalar": (1,),
        "momentum_buffer.a": (4, 6),
        "second_moment.a": (1, 6),
        "momentum_buffer.b": (4, 6),
        "second_moment.b": (1, 6),
        "momentum_buffer.tall": (6, 2),
        "second_moment.tall": (6, 1),
    }
    assert all(v.dtype == torch.float32 for v in tensors.values()) and set(counts.values()) == {1}


def test_missing_or_misshapen_state_is_named() -> None:
    run = Run()
    run.steps(0, 1)
    tensors, counts = run.optimizer.named_state(run.names)
    with pytest.raises(UserError, match=r"no exp_avg_sq of shape \(5, 3\) for embedding"):
        short = {k: v for k, v in tensors.items() if k != "exp_avg_sq.embedding"}
        run.optimizer.load_named_state(run.names, short, counts)
    with pytest.raises(UserError, match=r"momentum_buffer of shape \(.*\) for a"):
        run.optimizer.load_named_state(run.names, {**tensors, "momentum_buffer.a": torch.zeros(6, 4)}, counts)


# ---------------------------------------------------------------------------------------------------
# Groups


@pytest.mark.parametrize("form", [GPTConfig, GPTConfig.later, GPTConfig.plain])
@pytest.mark.parametrize("n_layer", [1, 2, 5])
def test_every_parameter_is_in_one_group(form: Any, n_layer: int) -> None:
    model = GPT.create(form(vocab_size=100, sequence_len=16, n_layer=n_layer, n_head=2, n_kv_head=1, n_embd=32))
    groups = build_param_groups(model, OptimizerConfig(), ns_dtype=torch.float32)
    placed = [id(p) for group in groups for p in group["params"]]
    assert len(placed) == len(set(placed)) and set(placed) == {id(p) for p in model.parameters()}
    in_blocks = {id(p) for p in model.blocks.parameters()}
    for group in groups:
        assert all((id(p) in in_blocks) == (group["kind"] == "muon") for p in group["params"])
        assert group["kind"] == "adamw" or all(p.dim() == 2 for p in group["params"])
    MuonAdamW(groups)


def test_the_table_of_ngrams_is_updated_by_sgd() -> None:
    """Under Adam it learns by heart what is read twice (dev/LOG.md)."""
    sizes = {"vocab_size": 100, "sequence_len": 16, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
    model = GPT.create(GPTConfig.small(**sizes))
    groups = build_param_groups(model, OptimizerConfig.later(), lr_scale=0.3, ns_dtype=torch.float32)
    rates = {id(p): (group["kind"], group["lr"]) for group in groups for p in group["params"]}
    kind, rate = rates[id(model.ngram_embed.weight)]
    assert kind == "sgd" and rate == pytest.approx(0.4 * rates[id(model.wte.weight)][1])


def test_parameters_that_are_no_matrices_get_the_rate_of_the_residual_scalars() -> None:
    """A learnable gain inside a block, or one beside them."""
    model = GPT.create(GPTConfig(vocab_size=64, sequence_len=16, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    model.blocks[0].gain = torch.nn.Parameter(torch.ones(32))
    model.temperature = torch.nn.Parameter(torch.ones(()))
    groups = build_param_groups(model, OptimizerConfig(), lr_scale=0.5, ns_dtype=torch.float32)
    (group,) = (g for g in groups if any(p is model.blocks[0].gain for p in g["params"]))
    assert group["kind"] == "adamw" and len(group["params"]) == 2 and group["lr"] == pytest.approx(0.0025)
    assert model.num_scaling_params()["scalars"] == 2 * 2 + 33 and sum(len(g["params"]) for g in groups) == len(
        list(model.parameters())
    )


def test_a_large_parameter_that_is_no_matrix_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    model = GPT.create(GPTConfig(vocab_size=64, sequence_len=16, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    model.blocks[0].experts = torch.nn.Parameter(torch.ones(4, 32, 32))
    build_param_groups(model, OptimizerConfig(), ns_dtype=torch.float32)
    assert "transformer.h.0.experts (4, 32, 32)" in capsys.readouterr().err


class SignedMomentum(UpdateRule):
    """A rule such as someone may add (Lion, arXiv 2302.06675): elementwise, one state tensor."""

    elementwise = True
    defaults: ClassVar[dict[str, Any]] = {"betas": (0.9, 0.99), "weight_decay": 0.0, "decay_scheduled": True}

    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"exp_avg": shape}

    def update(self, params: Any, grads: Any, state: dict[str, Any], step: int, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        update = state["exp_avg"].lerp(grads, 1 - beta1).sign_()
        params.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
        state["exp_avg"].lerp_(grads, 1 - beta2)


def test_a_new_rule_needs_only_itself_and_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "lion", SignedMomentum())
    config = GPTConfig(vocab_size=64, sequence_len=16, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    runs = [stir(GPT.create(config)) for _ in range(2)]
    rates = get_recipe("default,matrix_rule=lion,matrix_lr=0.001").optimizer()

    def train(model: GPT, optimizer: MuonAdamW, steps: range) -> None:
        for step in steps:
            idx = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(step))
            ScheduleConfig(6, warmup_steps=0).apply(optimizer.param_groups, step)
            model(idx[:, :-1], idx[:, 1:]).backward()
            optimizer.step()
            model.zero_grad()

    straight, first = (MuonAdamW(build_param_groups(m, rates, weight_decay=0.1, ns_dtype=torch.float32)) for m in runs)
    train(runs[0], straight, range(6))
    train(runs[1], first, range(3))
    names = {p: name for name, p in runs[1].named_parameters()}
    tensors, steps = first.named_state(names)
    assert "exp_avg.transformer.h.0.mlp.c_fc.weight" in tensors
    assert not any(name.startswith("momentum_buffer") for name in tensors)
    assert optimizer_bytes(first.param_groups) == sum(4 * t.numel() for t in tensors.values())
    again = MuonAdamW(build_param_groups(runs[1], rates, weight_decay=0.1, ns_dtype=torch.float32))
    again.load_named_state(names, tensors, steps)
    train(runs[1], again, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(runs[0].parameters(), runs[1].parameters()))


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("shape", [(6, 6), (4, 10), (10, 4)])
def test_state_bytes_are_what_a_step_allocates(kind: str, shape: tuple[int, int]) -> None:
    p = random(*shape).requires_grad_()
    p.grad = random(*shape, seed=1)
    optimizer = MuonAdamW([{"kind": kind, "params": [p], "lr": 0.1}])
    optimizer.step()
    tensors, _ = optimizer.named_state({p: "p"})
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == RULES[kind].state_bytes(shape)


def test_rates_by_hand() -> None:
    """Width 192 is a quarter of 768, so AdamW's matrix rates double; the scalars' do not."""
    model = GPT.create(GPTConfig.later(vocab_size=64, sequence_len=16, n_layer=2, n_head=2, n_kv_head=2, n_embd=192))
    settings = {"lr_scale": 0.5, "weight_decay": 0.07, "ns_dtype": torch.float32}
    names = {id(p): name for name, p in model.named_parameters()}

    def by_name(config: OptimizerConfig) -> dict[str, dict[str, Any]]:
        groups = build_param_groups(model, config, **settings)
        return {names[id(p)]: group for group in groups for p in group["params"]}

    published, later = by_name(OptimizerConfig()), by_name(OptimizerConfig.later())
    wanted = {  # name: (published rate, decay), (later rate, decay), later betas
        "lm_head.weight": ((0.004, 0.0), (0.008, 0.01), (0.8, 0.96)),
        "transformer.wte.weight": ((0.3, 0.0), (0.3, 0.001), (0.8, 0.995)),
        "value_embeds.1.weight": ((0.3, 0.0), (0.15, 0.01), (0.8, 0.995)),
        "resid_lambdas": ((0.0025, 0.0), (0.0025, 0.05), (0.8, 0.95)),
        "x0_lambdas": ((0.25, 0.0), (0.25, 0.0), (0.96, 0.95)),
        "smear_lambda": ((0.1, 0.0), (0.1, 0.0), (0.8, 0.95)),
        "backout_lambda": ((0.1, 0.0), (0.1, 0.0), (0.8, 0.95)),
    }
    for name, (first, second, betas) in wanted.items():
        for group, (lr, decay) in ((published[name], first), (later[name], second)):
            assert group["lr"] == pytest.approx(lr) and group["weight_decay"] == decay, name
        assert later[name]["betas"] == betas, name
    for groups, snap in ((published, False), (later, True)):
        matrix = groups["transformer.h.0.mlp.c_fc.weight"]
        assert matrix["lr"] == pytest.approx(0.01) and matrix["weight_decay"] == 0.07
        assert matrix["row_equilibrate"] is matrix["frobenius_snap"] is snap
