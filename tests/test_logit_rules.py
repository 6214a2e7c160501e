"""Penalties, biases, end tokens and min_p: the engine's tokens against the rules written out in plain Python."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_helpers import make_model
from serve_helpers import TOKENIZER
from stubs import BOS, END

from nanochat.cpu import kernels
from nanochat.engine import Engine
from nanochat.inference import sampling
from nanochat.inference.request import GenerationRequest
from nanochat.inference.sampling import SamplingParams, make_rng

MODEL = make_model(vocab_size=265)
PROMPT = [BOS, *b"abcab"]
LENGTH = 14


@pytest.fixture(params=["C", "PyTorch"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "PyTorch":
        monkeypatch.setattr(sampling.kernels, "in_use", lambda device: False)
    elif kernels.library() is None:
        pytest.skip("no C compiler")


def expected(request: GenerationRequest) -> list[int]:
    """As `follow_rules`; once for all forms."""
    if repr(request) not in EXPECTED:
        EXPECTED[repr(request)] = follow_rules(request)
    return EXPECTED[repr(request)]


EXPECTED: dict[str, list[int]] = {}


def follow_rules(request: GenerationRequest) -> list[int]:
    """The whole sequence through the model for every token, vLLM's rules, and a draw in float64."""
    params, answer, rng = request.sampling, list[int](), make_rng(request.sampling.seed, 0)
    ends, biases = {END, BOS}, dict(params.logit_bias)
    begun = request.prompt[len(request.prompt) - request.answer_begun :]
    for _ in range(request.max_tokens):
        logits = MODEL(torch.tensor([request.prompt + answer]))[0, -1].tolist()
        times = Counter(begun + answer)
        for token in range(len(logits)):
            if request.ignore_eos and token in ends:
                logits[token] = -math.inf
            if len(begun + answer) < request.min_tokens and token in ends | set(request.stop_token_ids):
                logits[token] = -math.inf
            logits[token] += biases.get(token, 0)
            if token in request.prompt or token in answer:
                if logits[token] > 0:
                    logits[token] /= params.repetition_penalty
                else:
                    logits[token] *= params.repetition_penalty
            logits[token] -= times[token] * params.frequency_penalty
            if times[token]:
                logits[token] -= params.presence_penalty
        token = draw(logits, params, rng)
        if token in ends | set(request.stop_token_ids):
            break
        answer.append(token)
    return answer


def draw(logits: list[float], params: SamplingParams, rng: Any) -> int:
    most = max(logits)
    if params.greedy:
        return logits.index(most)
    weights = [math.exp((x - most) / params.temperature) for x in logits]
    kept = sorted(range(len(logits)), key=lambda i: -weights[i])[: params.top_k or len(logits)]
    kept = [i for i in kept if weights[i] >= params.min_p]
    nucleus, reached = [], 0.0
    for i in kept:
        if reached < (1 if params.top_p is None else params.top_p) * sum(weights[j] for j in kept):
            nucleus.append(i)
        reached += weights[i]
    target, below = rng.random() * sum(weights[i] for i in nucleus), 0.0
    for i in sorted(nucleus):
        below += weights[i]
        if below > target:
            return i
    raise AssertionError("the draw is beyond the last token")


RULES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.5},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 2.0},
    {"frequency_penalty": -1.0},
    {"logit_bias": {97: 5, 98: -100, 200: 3.5}},
    {"logit_bias": {END: 8}},
    {"repetition_penalty": 1.3, "presence_penalty": -0.5, "frequency_penalty": 0.7, "logit_bias": {99: 4}},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"min_p": 0.2, "top_k": 20, "top_p": 0.9},
    {"min_p": 0.1, "frequency_penalty": 1.0, "top_p": 0.7},
    {"top_p": 0.0},
    {"top_k": -1},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_tokens_follow_the_rules(rules: dict[str, Any], temperature: float) -> None:
    for seed in range(3 if temperature else 1):
        request = GenerationRequest(PROMPT, LENGTH, SamplingParams(temperature, seed=seed).override(Given(rules)))
        (sequence,) = Engine(MODEL, TOKENIZER).complete([request])
        assert sequence.tokens == expected(request)


class Given:
    """Values as attributes, as a request body has them."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__ |= values


@pytest.mark.parametrize(
    "ending",
    [
        {"ignore_eos": True},
        {"min_tokens": 6},
        {"min_tokens": 6, "stop_token_ids": [97, 10, 120]},
        {"stop_token_ids": list(range(60))},
        {"ignore_eos": True, "stop_token_ids": list(range(200, 230))},
    ],
    ids=str,
)
def test_where_an_answer_ends(ending: dict[str, Any]) -> None:
    ended = Counter[Any]()
    for seed in range(8):
        bias = {END: 4.0, 97: 3.0}
        request = GenerationRequest(PROMPT, LENGTH, SamplingParams(1.0, seed=seed, logit_bias=bias), **ending)  # type: ignore[arg-type]
        (sequence,) = Engine(MODEL, TOKENIZER).complete([request])
        assert sequence.tokens == expected(request)
        ended[sequence.end] += 1
    assert len(ended) > 1 or ending == {"ignore_eos": True}


@pytest.mark.parametrize("rules", [{"presence_penalty": 1.5}, {"frequency_penalty": 2.0}], ids=str)
def test_the_beginning_that_an_answer_was_given_counts(rules: dict[str, Any]) -> None:
    params = SamplingParams(0.9, seed=1).override(Given(rules))
    request = GenerationRequest([*PROMPT, 97, 97, 98], LENGTH, params, answer_begun=3, min_tokens=8)
    (sequence,) = Engine(MODEL, TOKENIZER).complete([request])
    assert sequence.tokens == expected(request) != expected(replace(request, answer_begun=0, min_tokens=5))


def test_the_same_alone_and_in_a_batch() -> None:
    params = [SamplingParams(0.9, seed=i).override(Given(rules)) for i, rules in enumerate([{}, *RULES] * 2)]
    requests = [GenerationRequest([*PROMPT, 32 + i % 5], LENGTH, p, 2) for i, p in enumerate(params)]
    engine = Engine(MODEL, TOKENIZER)
    together = [sequence.tokens for sequence in engine.complete(requests, batch_size=9)]
    assert together == [s.tokens for request in requests for s in engine.complete([request])]
    plain = replace(requests[0], sampling=SamplingParams(0.9, seed=0))
    assert together[:2] == [s.tokens for s in engine.complete([plain])]


@pytest.mark.parametrize(
    "values",
    [
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -3},
        {"frequency_penalty": math.nan},
        {"logit_bias": {5: 101}},
        {"logit_bias": {5: math.nan}},
    ],
    ids=str,
)
def test_values_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        SamplingParams(**values)
