"""Drawing tokens: against a float64 softmax and worked examples, in C and in PyTorch."""

import functools
import math
import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat.cpu import kernels
from nanochat.inference import sampling
from nanochat.inference.sampling import SamplingParams, draw_tokens, make_rng


@pytest.fixture(autouse=True, params=["C", "PyTorch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every test runs on both paths."""
    if request.param == "PyTorch":
        monkeypatch.setattr(sampling.kernels, "in_use", lambda device: False)
    elif kernels.library() is None:
        pytest.skip("no C compiler")
    return request.param


WORKED = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()  # ranks: token 1, 3, 0, 2


class Grid:
    """A generator of the midpoints of n equal intervals, so that shares are exact."""

    def __init__(self, n: int) -> None:
        self.values = iter((i + 0.5) / n for i in range(n))

    def random(self) -> float:
        return next(self.values)


class Fixed:
    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


def shares(logits: torch.Tensor, sampling: SamplingParams, n: int = 4000) -> torch.Tensor:
    """The share of each token over an even grid of n draws: its probability to within 1/n."""
    grid = Grid(n)
    tokens = draw_tokens(logits.expand(n, -1), [sampling] * n, [grid] * n)  # type: ignore[list-item]
    return torch.bincount(torch.tensor(tokens), minlength=logits.size(-1)).double() / n


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.5])
def test_shares_are_those_of_a_float64_softmax(temperature: float) -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 3
    exact = (logits[0].double() / temperature).softmax(0)
    assert (shares(logits, SamplingParams(temperature)) - exact).abs().max() < 1.5 / 4000


def test_draws_of_many_samples_follow_the_distribution() -> None:
    n = 20000
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    rngs = [make_rng(7, i) for i in range(n)]
    counts = torch.bincount(
        torch.tensor(draw_tokens(logits.expand(n, -1), [SamplingParams()] * n, rngs)), minlength=4
    ).double()
    p = logits[0].double().softmax(0)
    assert ((counts - n * p).abs() < 5 * (n * p * (1 - p)).sqrt()).all()  # five standard deviations


def test_temperature_zero_takes_the_most_likely() -> None:
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(1))
    rngs = [make_rng(0, i) for i in range(16)]
    assert draw_tokens(logits, [SamplingParams(0.0)] * 16, rngs) == logits.argmax(-1).tolist()
    assert draw_tokens(logits, [SamplingParams(1.0, top_k=1)] * 16, rngs) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.1, [1]),
        (0.49, [1]),
        (0.51, [1, 3]),
        (0.79, [1, 3]),
        (0.81, [0, 1, 3]),
        (0.96, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_worked_example(top_p: float, kept: list[int]) -> None:
    p = WORKED.exp()[0].double()
    expected = torch.zeros(4, dtype=torch.float64)
    expected[kept] = p[kept] / p[kept].sum()
    assert (shares(WORKED, SamplingParams(top_p=top_p)) - expected).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("min_p", "kept"), [(0.05, [0, 1, 2, 3]), (0.2, [0, 1, 3]), (0.4, [1, 3]), (0.7, [1]), (1.0, [1])]
)
def test_min_p_worked_example(min_p: float, kept: list[int]) -> None:
    p = WORKED.exp()[0].double()
    expected = torch.zeros(4, dtype=torch.float64)
    expected[kept] = p[kept] / p[kept].sum()
    assert (shares(WORKED, SamplingParams(min_p=min_p)) - expected).abs().max() < 1e-3


def test_min_p_applies_after_temperature_and_before_top_p() -> None:
    # At temperature 0.5 the probabilities are squared: .09 is .36 of .25. Of .5 and .3, .6 is reached by the first.
    assert (shares(WORKED, SamplingParams(0.5, min_p=0.4)) > 0).tolist() == [False, True, False, False]
    assert (shares(WORKED, SamplingParams(min_p=0.4)) > 0).tolist() == [False, True, False, True]
    assert shares(WORKED, SamplingParams(min_p=0.4, top_p=0.6)).tolist() == [0, 1, 0, 0]


def test_top_p_of_zero_takes_the_most_likely() -> None:
    assert shares(WORKED, SamplingParams(top_p=0.0)).tolist() == [0, 1, 0, 0]


def test_top_p_applies_after_top_k() -> None:
    # top_k=2 leaves .5 and .3, that is .625 and .375 of what is left: .6 is reached by the first alone.
    assert shares(WORKED, SamplingParams(top_k=2, top_p=0.6)).tolist() == [0, 1, 0, 0]
    assert shares(WORKED, SamplingParams(top_p=0.6))[3] > 0


def test_temperature_applies_before_top_p() -> None:
    # At temperature 0.5 the probabilities are squared: .25 of .365 is .68.
    assert shares(WORKED, SamplingParams(0.5, top_p=0.65)).tolist() == [0, 1, 0, 0]
    assert shares(WORKED, SamplingParams(1.0, top_p=0.65))[3] > 0


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(top_k=3), SamplingParams(top_p=0.99)])
def test_the_order_of_nearly_equal_tokens_does_not_matter(sampling: SamplingParams) -> None:
    """Another batch size may change the last bits of a logit; the drawn token must not depend on them."""
    draws = [Fixed(i / 50) for i in range(50)]
    first = torch.tensor([[1.0 + 1e-6, 0.0, 1.0, 0.5]]).expand(50, -1)
    second = torch.tensor([[1.0, 0.0, 1.0 + 1e-6, 0.5]]).expand(50, -1)
    assert draw_tokens(first, [sampling] * 50, draws) == draw_tokens(second, [sampling] * 50, draws)  # type: ignore[arg-type]


@pytest.mark.parametrize("top_k", [None, 0, 4, 5, 1000])
def test_top_k_off_or_beyond_the_vocabulary(top_k: int | None) -> None:
    assert (shares(WORKED, SamplingParams(top_k=top_k)) - WORKED.exp()[0].double()).abs().max() < 1e-3


def test_top_k_keeps_exactly_k_of_equal_tokens() -> None:
    assert (shares(torch.zeros(1, 100), SamplingParams(top_k=7)) > 0).sum() == 7


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(), SamplingParams(top_k=2), SamplingParams(top_p=0.7), SamplingParams(1e-6), SamplingParams(1e6)],
)
@pytest.mark.parametrize("draw", [0.0, 0.5, math.nextafter(1, 0)])
def test_extreme_random_numbers_never_pick_an_excluded_token(sampling: SamplingParams, draw: float) -> None:
    logits = torch.cat([torch.full((1, 5), -torch.inf), WORKED, torch.full((1, 3000), -torch.inf)], dim=1)
    allowed = {SamplingParams(top_k=2): {6, 8}, SamplingParams(top_p=0.7): {6, 8}, SamplingParams(1e-6): {6}}.get(
        sampling, {5, 6, 7, 8}
    )
    assert draw_tokens(logits, [sampling], [Fixed(draw)])[0] in allowed  # type: ignore[list-item]


def test_rows_with_different_settings_are_independent() -> None:
    settings = [
        SamplingParams(0.0),
        SamplingParams(),
        SamplingParams(0.5, top_k=3),
        SamplingParams(top_p=0.9),
        SamplingParams(),
        SamplingParams(0.0),
    ]
    logits = torch.randn(6, 30, generator=torch.Generator().manual_seed(2))
    together = draw_tokens(logits, settings, [make_rng(3, i) for i in range(6)])
    assert together == [draw_tokens(logits[i : i + 1], [settings[i]], [make_rng(3, i)])[0] for i in range(6)]


def reference(logits: list[float], temperature: float, top_k: int | None, draw: float) -> tuple[int, float]:
    """The draw in plain Python: the token, and its distance from a neighbouring token as a share of the total."""
    most = max(logits)
    weights = [math.exp((x - most) / temperature) for x in logits]
    kept = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or len(logits)]
    total = sum(weights[i] for i in kept)
    below = 0.0
    for token in sorted(kept):
        if below + weights[token] > draw * total:
            return token, min(draw * total - below, below + weights[token] - draw * total) / total
        below += weights[token]
    raise AssertionError("the draw is beyond the last token")


@pytest.mark.parametrize("top_k", [None, 1, 2, 5, 50, 129])
@pytest.mark.parametrize("temperature", [0.05, 0.8, 3.0])
def test_every_draw_equals_plain_python(top_k: int | None, temperature: float, form: str) -> None:
    dice, compared = random.Random(4), 0
    for vocab_size in (5, 64, 65, 200, 1000):
        # Many equal logits at the threshold, of which C keeps the first; PyTorch's topk does not say which.
        common = (2.5, -math.inf) if form == "C" else ()
        rows = [[dice.choice((dice.gauss(0, 3), *common)) for _ in range(vocab_size)] for _ in range(20)]
        draws = [dice.random() for _ in rows]
        given = draw_tokens(torch.tensor(rows), [SamplingParams(temperature, top_k)] * 20, [Fixed(d) for d in draws])  # type: ignore[arg-type, misc]
        for row, draw, token in zip(torch.tensor(rows).tolist(), draws, given):
            expected, margin = reference(row, temperature, top_k, draw)
            if margin > 1e-6:
                assert token == expected
                compared += 1
    assert compared > 90


@pytest.mark.parametrize("values", [{"temperature": 1e-300}, {"top_k": 2**64 + 1}, {"temperature": 1e6, "top_k": 5}])
def test_extreme_settings(values: dict[str, Any]) -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    taken = shares(logits, SamplingParams(**values), 1000).nonzero().flatten().tolist()
    likeliest = logits[0].argsort(descending=True).tolist()
    expected = likeliest[:1] if values.get("temperature", 1) < 1 else likeliest[: values["top_k"]]
    assert taken == sorted(expected)


@dataclass(frozen=True)
class TopA(SamplingParams):
    """A new field: keep tokens at least top_a times as likely as the square of the highest probability."""

    top_a: float = 0.0

    def distribution(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        probs, ids = super().distribution(logits)
        return probs.masked_fill(probs < self.top_a * probs.amax(-1, keepdim=True) ** 2, 0), ids


def test_a_subclass_draws_from_its_own_distribution() -> None:
    """With and without C, alone and beside rows that C draws."""
    expected = torch.tensor([0.0, 0.625, 0.0, 0.375], dtype=torch.float64)
    assert (shares(WORKED, TopA(top_a=0.8)) - expected).abs().max() < 1e-3
    rows: list[SamplingParams] = [SamplingParams(), TopA(top_a=0.8), SamplingParams(top_k=1)]
    tokens = draw_tokens(WORKED.expand(3, -1), rows, [Fixed(0.01), Fixed(0.01), Fixed(0.01)])  # type: ignore[list-item]
    assert tokens == [0, 1, 1]


def test_settings_c_does_not_implement_take_the_pytorch_path(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if top_k were a new field that sampling.c lacks."""
    monkeypatch.setattr(sampling, "C_FIELDS", ("temperature", "top_p", "seed"))
    in_c: list[int] = []
    draw_in_c, _ = sampling._draw_in_c, form == "C" and sampling.c_agrees()
    monkeypatch.setattr(sampling, "_draw_in_c", lambda *args: in_c.append(len(args[1])) or draw_in_c(*args))
    assert (shares(WORKED, SamplingParams(top_k=2), 10) > 0).tolist() == [False, True, False, True] and not in_c
    shares(WORKED, SamplingParams(), 10)
    assert in_c == ([10] if form == "C" else [])


def test_c_that_disagrees_with_pytorch_is_not_used(
    form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sampling, "c_agrees", functools.cache(sampling.c_agrees.__wrapped__))  # as in a new process
    monkeypatch.setattr(sampling, "_draw_in_c", lambda logits, params, rngs: [0] * len(params))
    for _ in range(2):
        assert draw_tokens(WORKED, [SamplingParams(0.0)], [make_rng(0, 0)]) == [1]
    assert capsys.readouterr().err.count("sampling.c") == (form == "C")


def test_override() -> None:
    given = SimpleNamespace(temperature=0.0, top_k=None, seed=7, other=1)
    assert SamplingParams(0.5, 20, 0.9).override(given) == SamplingParams(0.0, 20, 0.9, 7)


def test_seeds_are_unrelated() -> None:
    pairs = [(seed, index) for seed in (-12, -1, 0, 1, 11, 12) for index in (0, 1, 2, 12)]
    streams = {pair: [make_rng(*pair).random() for _ in range(3)] for pair in pairs}
    assert len({tuple(values) for values in streams.values()}) == len(pairs)  # -1 is not 1, nor (1, 12) (11, 2)
    assert make_rng(5, 3).random() == make_rng(5, 3).random()


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -2},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"top_p": math.nan},
    ],
)
def test_values_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        SamplingParams(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite(temperature: float, bad: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 2] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        draw_tokens(logits, [SamplingParams(temperature)] * 2, [make_rng(0, 0), make_rng(0, 1)])
