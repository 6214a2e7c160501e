"""The model against the published implementation's numbers and against a plain rewriting in float64."""

import json
import math
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from stubs import stir

from nanochat.common import UserError
from nanochat.gpt import GPT, MLP, GPTConfig

FORMS = {
    "published": GPTConfig,
    "later": GPTConfig.later,
    "plain": GPTConfig.plain,
    "ngrams": partial(GPTConfig.later, ngram_rows=97, ngram_dim=8),
}


def randomized(config: GPTConfig, seed: int = 0) -> GPT:
    """A model in which no part is the identity: a fresh one has projections and gates of zero."""
    return stir(GPT.create(config), 0.1, seed)


def tokens(B: int, T: int, vocab_size: int = 300, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------
# The published implementation


@pytest.fixture(params=["published", "later"])
def golden(request: pytest.FixtureRequest, goldens: Path) -> tuple[GPT, dict[str, torch.Tensor], dict[str, Any]]:
    """(our model with the golden weights, golden tensors, golden facts)."""
    facts = json.loads((goldens / f"model_{request.param}.json").read_text(encoding="utf-8"))
    tensors = load_file(goldens / f"gpt_{request.param}.safetensors")
    model = GPT.create(FORMS[request.param](**facts["config"]))
    model.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("w.")})  # strict: same names
    return model, tensors, facts


def test_golden_logits_loss_and_gradients(golden: tuple[GPT, dict[str, torch.Tensor], dict[str, Any]]) -> None:
    model, t, facts = golden
    idx, targets = t["idx"].long(), t["targets"].long()
    with torch.no_grad():
        logits = model(idx)[:, ::32]
        losses = model(idx, targets, loss_reduction="none")
    torch.testing.assert_close(logits, t["logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(losses.view_as(t["loss_per_token"]), t["loss_per_token"], rtol=0, atol=1e-4)
    loss = model(idx, targets)
    assert loss.item() == pytest.approx(t["loss"].item(), abs=1e-5)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert p.grad.norm().item() == pytest.approx(facts["gradient_norms"][name], rel=1e-3), name
        wanted = t.get(f"g.{name}")
        if wanted is not None:
            error = (p.grad[: len(wanted)] - wanted).norm() / wanted.norm()
            assert error < 1e-3, (name, error)


def test_golden_counts(golden: tuple[GPT, dict[str, torch.Tensor], dict[str, Any]]) -> None:
    model, _, facts = golden
    assert model.estimate_flops() == facts["flops_per_token"]
    assert model.num_scaling_params() == facts["scaling_params"]
    assert [list(w) for w in model.window_sizes] == facts["window_sizes"]
    assert model.config.padded_vocab_size == facts["padded_vocab"]


# ---------------------------------------------------------------------------------------------------
# A plain rewriting


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt()


def rotate(x: torch.Tensor, base: float) -> torch.Tensor:
    """x (B, T, H, D) turned as complex numbers, the first half of a head real and the second imaginary."""
    T, D = x.size(1), x.size(-1)
    angle = torch.arange(T)[:, None] * base ** (-torch.arange(0, D, 2).double() / D)
    turned = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.polar(torch.ones(()).double(), -angle)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """(B, T, H, D) queries that stand at the end of (B, S, G, D) keys."""
    T, S, repeat = q.size(1), k.size(1), q.size(2) // k.size(2)
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    distance = torch.arange(S - T, S)[:, None] - torch.arange(S)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.size(-1))
    weights = scores.masked_fill((distance < 0) | (distance > window), -math.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def naive_logits(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """The forward pass from its description, float64, (B, T) -> (B, T, V)."""
    c, p = model.config, {name: t.detach().double() for name, t in model.named_parameters()}
    (B, T), D = idx.shape, c.head_dim
    x = p["transformer.wte.weight"][idx]
    for b in range(B if c.ngram_rows else 0):
        for t in range(T):
            one, two, three = ([-1, -1, *idx[b].tolist()][t + 2 - back] for back in range(3))
            pair = 998244353 * one + 1000000007 * (two + 1)
            rows = p["ngram_embed.weight"][[pair % c.ngram_rows, (pair + 1610612741 * (three + 1)) % c.ngram_rows]]
            x[b, t] += p["ngram_proj.weight"] @ (rows[0] + rows[1])
    x = rms(x)
    if c.smear:
        gate = torch.sigmoid(x[..., : c.smear_channels] @ p["smear_gate.weight"].T)
        x = x + p["smear_lambda"] * gate * F.pad(x, (0, 0, 1, 0))[:, :T]
    x0 = x
    for i in range(c.n_layer):
        w = {n.removeprefix(f"transformer.h.{i}."): t for n, t in p.items() if n.startswith(f"transformer.h.{i}.")}
        if c.residual_scalars:
            x = p["resid_lambdas"][i] * x + p["x0_lambdas"][i] * x0
        h = rms(x)
        q, k, v = ((h @ w[f"attn.c_{n}.weight"].T).view(B, T, -1, D) for n in "qkv")
        if c.value_embeds and (c.n_layer - 1 - i) % 2 == 0:
            gate = c.value_gate_scale * torch.sigmoid(h[..., : c.value_gate_channels] @ w["attn.ve_gate.weight"].T)
            v = v + gate[..., None] * p[f"value_embeds.{i}.weight"][idx].view(B, T, -1, D)
        q, k = (c.qk_scale * rms(rotate(y, c.rope_base)) for y in (q, k))
        x = x + attention(q, k, v, c.window_sizes()[i][0]).reshape(B, T, -1) @ w["attn.c_proj.weight"].T
        x = x + (rms(x) @ w["mlp.c_fc.weight"].T).relu().square() @ w["mlp.c_proj.weight"].T
        if i == c.n_layer // 2:
            middle = x
    if c.backout:
        x = x - p["backout_lambda"] * middle
    return c.softcap * torch.tanh(rms(x) @ p["lm_head.weight"][: c.vocab_size].T / c.softcap)


SIZES = [
    {"n_layer": 1, "n_head": 2, "n_kv_head": 2, "n_embd": 16, "sequence_len": 24},
    {"n_layer": 3, "n_head": 4, "n_kv_head": 1, "n_embd": 32, "sequence_len": 24},
    {"n_layer": 5, "n_head": 6, "n_kv_head": 3, "n_embd": 24, "sequence_len": 150, "window_pattern": "SL"},
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", SIZES)
def test_forward_matches_a_plain_rewriting(form: str, sizes: dict[str, Any]) -> None:
    model = randomized(FORMS[form](vocab_size=100, **sizes))
    idx = tokens(2, sizes["sequence_len"], 100)
    with torch.no_grad():
        torch.testing.assert_close(model(idx).double(), naive_logits(model, idx), rtol=1e-4, atol=2e-4)


class ListCache:
    """The simplest cache there can be: every key and value, concatenated."""

    def __init__(self, B: int) -> None:
        self.lengths = torch.zeros(B, dtype=torch.long)
        self.recent = torch.full((B, 3), -1)
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        if layer in self.layers:
            k, v = (torch.cat(pair, 1) for pair in zip(self.layers[layer], (k, v)))
        self.layers[layer] = k, v
        return attention(q, k, v, window)

    def advance(self, idx: torch.Tensor) -> None:
        self.lengths += idx.size(1)
        self.recent = torch.cat([self.recent, idx], 1)[:, -3:]


@pytest.mark.parametrize("form", FORMS)
def test_prefill_and_decode_equal_one_pass(form: str) -> None:
    model = randomized(FORMS[form](vocab_size=100, sequence_len=16, n_layer=3, n_head=2, n_kv_head=1, n_embd=32))
    idx, cache = tokens(2, 16, 100), ListCache(2)
    with torch.no_grad():
        pieces = [model(part, kv_cache=cache) for part in idx.split([7, 1, 1, 4, 1, 1, 1], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(idx), rtol=1e-4, atol=1e-4)
        assert torch.equal(model(idx.int()), model(idx))


@pytest.mark.parametrize("form", FORMS)
def test_no_token_sees_the_future(form: str) -> None:
    model = randomized(FORMS[form](vocab_size=100, sequence_len=24, n_layer=3, n_head=2, n_kv_head=2, n_embd=32))
    idx = tokens(1, 24, 100)
    changed = idx.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 100
    with torch.no_grad():
        before, after = model(idx), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert (before[:, 12:] - after[:, 12:]).abs().max() > 0.1


def test_gradients_match_finite_differences() -> None:
    """Through the fused loss and the blocked attention, along a random direction of all parameters at once."""
    model = randomized(GPTConfig.later(sequence_len=32, vocab_size=300, n_layer=2, n_head=4, n_kv_head=2, n_embd=32))
    model = model.double()
    model.compute_dtype = torch.float64
    idx, targets = tokens(2, 32), tokens(2, 32, seed=1)
    model(idx, targets).backward()
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in model.parameters()]
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), directions))

    def naive_loss(step: float) -> float:
        with torch.no_grad():
            for p, d in zip(model.parameters(), directions):
                p.add_(d, alpha=step)
            loss = F.cross_entropy(naive_logits(model, idx).flatten(0, 1), targets.flatten()).item()
            for p, d in zip(model.parameters(), directions):
                p.sub_(d, alpha=step)
        return loss

    wanted = (naive_loss(1e-5) - naive_loss(-1e-5)) / 2e-5
    assert float(slope) == pytest.approx(wanted, rel=1e-3)


# ---------------------------------------------------------------------------------------------------
# Initialisation


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_layer", [1, 2, 3, 5])
def test_init_reaches_every_parameter_and_buffer(form: str, n_layer: int) -> None:
    model = GPT.create(FORMS[form](vocab_size=100, sequence_len=16, n_layer=n_layer, n_head=2, n_kv_head=1, n_embd=32))
    with torch.no_grad():
        for tensor in chain(model.parameters(), model.buffers()):
            tensor.fill_(math.nan)
    model.init_weights()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        assert tensor.isfinite().all(), name
        assert tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def test_init_follows_the_published_recipe() -> None:
    sizes: dict[str, Any] = {"vocab_size": 512, "n_layer": 4, "n_head": 4, "n_kv_head": 4, "n_embd": 256}
    for form, wte_std, fc_factor in (("published", 1.0, 1.0), ("later", 0.8, 0.4)):
        model = GPT.create(FORMS[form](sequence_len=16, **sizes))
        p = dict(model.named_parameters())
        stds = {
            "transformer.wte.weight": wte_std,
            "lm_head.weight": 0.001,
            "value_embeds.3.weight": 1 / 16,
            "transformer.h.0.attn.c_q.weight": 1 / 16,
            "transformer.h.2.attn.c_v.weight": 1 / 16,
            "transformer.h.1.mlp.c_fc.weight": fc_factor / 16,
        }
        for name, std in stds.items():
            assert p[name].std().item() == pytest.approx(std, rel=0.02), name
            assert p[name].mean().abs() < 0.02 * std
        for block in model.blocks:
            assert (block.attn.c_proj.weight == 0).all() and (block.mlp.c_proj.weight == 0).all()
        assert p["transformer.h.0.attn.c_q.weight"].abs().max() <= math.sqrt(3) / 16  # uniform
        gate = p["transformer.h.1.attn.ve_gate.weight"]
        if form == "later":
            assert gate.min() >= 0 and 0.015 < gate.max() <= 0.02
            torch.testing.assert_close(p["resid_lambdas"].detach()[[0, -1]], torch.tensor([1.15, 1.05]))
            torch.testing.assert_close(p["x0_lambdas"].detach()[[0, -1]], torch.tensor([0.20, 0.05]))
            assert p["smear_lambda"].item() == 0 and p["backout_lambda"].item() == pytest.approx(0.2)
        else:
            assert (gate == 0).all() and (p["resid_lambdas"] == 1).all() and (p["x0_lambdas"] == 0.1).all()


def test_same_seed_same_weights(tiny_config: GPTConfig) -> None:
    states = [GPT.create(tiny_config, seed=seed).state_dict() for seed in (5, 5, 6)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])


def test_fresh_model_knows_nothing(tiny_model: GPT) -> None:
    idx, targets = tokens(4, 32), tokens(4, 32, seed=1)
    assert tiny_model(idx, targets).item() == pytest.approx(math.log(300), abs=0.01)


# ---------------------------------------------------------------------------------------------------
# Loss, padding, precision


def test_reductions_agree(tiny_model: GPT) -> None:
    idx, targets = tokens(2, 32), tokens(2, 32, seed=1)
    targets[:, ::3] = -1
    losses = tiny_model(idx, targets, loss_reduction="none")
    assert losses.shape == (64,) and (losses.view(2, 32)[:, ::3] == 0).all()
    total = tiny_model(idx, targets, loss_reduction="sum")
    torch.testing.assert_close(total, losses.sum())
    torch.testing.assert_close(tiny_model(idx, targets), total / (targets >= 0).sum())
    weights = torch.rand(2, 32, generator=torch.Generator().manual_seed(2))
    weighted, same = tiny_model.loss(idx, targets, weights)
    torch.testing.assert_close(weighted, (losses * weights.flatten()).sum())
    torch.testing.assert_close(same, losses)
    assert tiny_model(idx, torch.full_like(targets, -1)).item() == 0


def test_padding_of_the_vocabulary_is_invisible(tiny_config: GPTConfig) -> None:
    model = randomized(tiny_config)
    idx, targets = tokens(2, 32), tokens(2, 32, seed=1)
    assert model.lm_head.weight.shape == (320, 32) and model(idx).shape == (2, 32, 300)
    before = model(idx, targets)
    before.backward()
    assert model.lm_head.weight.grad is not None and (model.lm_head.weight.grad[300:] == 0).all()
    with torch.no_grad():
        model.lm_head.weight[300:] = 1e6
        model.wte.weight[300:] = 1e6
    assert torch.equal(model(idx, targets), before)


def test_logits_stay_within_the_cap(tiny_config: GPTConfig) -> None:
    model = randomized(tiny_config)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
        logits = model(tokens(2, 32))
    assert logits.abs().max() <= 15 and logits.dtype == torch.float32


def test_bf16_computes_close_to_fp32_and_keeps_fp32_weights(tiny_config: GPTConfig) -> None:
    full, half = randomized(tiny_config), randomized(tiny_config)
    half.compute_dtype = torch.bfloat16
    idx, targets = tokens(2, 32), tokens(2, 32, seed=1)
    losses = [model(idx, targets) for model in (full, half)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)
    assert half.hidden(idx).dtype == torch.bfloat16
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(full.named_parameters(), half.parameters()):
        assert q.dtype == torch.float32 and q.grad is not None and q.grad.dtype == torch.float32
        assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), 0) > 0.98, name  # type: ignore[union-attr]


def test_prompts_may_be_longer_than_the_training_rows_up_to_the_table(tiny_config: GPTConfig) -> None:
    model = randomized(tiny_config)
    with torch.no_grad():
        assert model(tokens(1, 320)).isfinite().all()
        with pytest.raises(AssertionError, match="rotary table"):
            model(tokens(1, 321))


# ---------------------------------------------------------------------------------------------------
# Configuration and counts


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"n_layer": 0}, "n_layer must be at least 1 and at most 1024, got 0"),
        ({"vocab_size": -3}, "vocab_size"),
        ({"sequence_len": 1}, "sequence_len must be at least 2"),
        ({"n_embd": 100, "n_head": 6}, "n_embd=100 is not divisible by n_head=6"),
        ({"n_head": 6, "n_kv_head": 4}, "n_head=6 is not divisible by n_kv_head=4"),
        ({"n_embd": 6, "n_head": 2, "n_kv_head": 2}, "even"),
        ({"window_pattern": "SXL"}, "letters S and L, got 'SXL'"),
        ({"window_pattern": ""}, "letters S and L"),
        ({"short_window_divisor": 0}, "short_window_divisor"),
        ({"init": "best"}, "'published' or 'later', got 'best'"),
        ({"softcap": float("nan")}, "softcap"),
        ({"n_layer": 10**9}, "n_layer"),
        ({"sequence_len": 10**12}, "sequence_len"),
    ],
)
def test_wrong_sizes_are_named_in_one_line(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        GPTConfig(**wrong)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_config_survives_json(form: str) -> None:
    config = FORMS[form](n_layer=3, n_embd=64, n_head=2, n_kv_head=1)
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(UserError, match="dropout"):
        GPTConfig.from_dict({**config.to_dict(), "dropout": 0.1})


@pytest.mark.parametrize(
    "config, lefts",
    [
        (GPTConfig(n_layer=6), [1024, 1024, 1024, 2048, 1024, 2048]),  # the last layer is always L
        (GPTConfig(n_layer=1, window_pattern="S"), [2048]),
        (GPTConfig(n_layer=3, window_pattern="sl", sequence_len=100), [50, 100, 100]),
        (GPTConfig.later(n_layer=4), [512, 512, 512, 2048]),
        (GPTConfig.later(n_layer=3, sequence_len=600), [256, 256, 600]),  # 150, rounded up to a multiple of 128
        (GPTConfig.later(n_layer=2, sequence_len=100), [100, 100]),  # never more than the context
        (GPTConfig.plain(n_layer=2), [2048, 2048]),
    ],
)
def test_windows_by_hand(config: GPTConfig, lefts: list[int]) -> None:
    assert config.window_sizes() == [(left, 0) for left in lefts]


@pytest.mark.parametrize("n_layer, layers", [(1, [0]), (2, [1]), (3, [0, 2]), (4, [1, 3]), (5, [0, 2, 4])])
def test_value_embeddings_on_every_other_layer_and_the_last(n_layer: int, layers: list[int]) -> None:
    config = GPTConfig(n_layer=n_layer)
    assert [i for i in range(n_layer) if config.has_value_embed(i)] == layers


def test_counts_by_hand(tiny_model: GPT) -> None:
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 2 * 32 * 128  # q, k and v of 2 heads of 8, projection, MLP
    gate = 32 * 2  # of the second layer
    counts = tiny_model.num_scaling_params()
    assert counts == {
        "wte": 320 * 32,
        "value_embeds": 320 * 16,
        "lm_head": 320 * 32,
        "transformer_matrices": 2 * layer + gate,
        "scalars": 4,
        "total": 2 * 320 * 32 + 320 * 16 + 2 * layer + gate + 4,
    }
    attention_flops = 12 * 4 * 8 * (16 + 32)  # heads, head size, and the windows of the two layers
    assert tiny_model.estimate_flops() == 6 * (2 * layer + gate + 320 * 32) + attention_flops


def test_the_matrix_of_the_ngrams_is_no_scalar() -> None:
    sizes = {"vocab_size": 100, "sequence_len": 16, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 64}
    counts = GPT.create(GPTConfig.small(**sizes)).num_scaling_params()
    assert (counts["ngram_embed"], counts["ngram_proj"]) == (64 * 100 * 32, 32 * 64)
    assert counts["scalars"] == 2 * 2 + 1 and sum(counts.values()) == 2 * counts["total"]


def test_explicit_sizes_express_the_published_d24() -> None:
    with torch.device("meta"):
        counts = GPT(GPTConfig(n_layer=24, n_embd=1024, n_head=8, n_kv_head=8)).num_scaling_params()
    assert counts["total"] == pytest.approx(8e8, rel=0.05)
    assert counts["value_embeds"] == 12 * 32768 * 1024


def test_a_parameter_that_init_weights_leaves_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What __init__ sets is lost: the model is built without memory. Untouched memory must not be trained on."""
    built = MLP.__init__

    def with_gain(self: MLP, config: GPTConfig) -> None:
        built(self, config)
        self.gain = torch.nn.Parameter(torch.ones(config.n_embd))

    monkeypatch.setattr(MLP, "__init__", with_gain)
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.mlp\.gain"):
        GPT.create(GPTConfig(16, 64, n_layer=1, n_head=2, n_kv_head=2, n_embd=16))


def test_a_shared_parameter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    built = GPT.__init__

    def tied(self: GPT, *args: Any) -> None:
        built(self, *args)
        self.lm_head.weight = self.wte.weight

    monkeypatch.setattr(GPT, "__init__", tied)
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        GPT.create(GPTConfig(16, 64, n_layer=1, n_head=2, n_kv_head=2, n_embd=16))
