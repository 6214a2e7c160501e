"""The engine: numbers against greedy decoding without a cache, everything else with a scripted model."""

import functools
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import pytest
import torch
from engine_helpers import answers, complete, sequence
from hypothesis import given, settings, strategies as st
from stubs import BOS, END, OUTPUT, OUTPUT_END, PYTHON, PYTHON_END, SPECIAL, START, TOKENIZER, Scripted, chain, stir

from nanochat.conversation import parse_answer
from nanochat.engine import AnswerStream, Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference import prefill
from nanochat.inference.decoding import RunningBatch
from nanochat.inference.decoding_weights import DecodingWeights
from nanochat.inference.request import GenerationRequest, Token, TokenSequence
from nanochat.inference.tools import ToolSession, ToolTable
from nanochat.optim import MuonAdamW, OptimizerConfig, build_param_groups
from nanochat.serve.sample import Sample

SIZES = {"sequence_len": 32, "vocab_size": 265, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
CONFIGS = {
    "published": GPTConfig(**SIZES),
    "later": GPTConfig.later(**{**SIZES, "short_window_divisor": 2}),
    "ngrams": GPTConfig.later(**{**SIZES, "short_window_divisor": 2, "ngram_rows": 97, "ngram_dim": 16}),
    "plain": GPTConfig.plain(**SIZES),
}


def make_model(config: GPTConfig, dtype: torch.dtype = torch.float32) -> GPT:
    """A model in which every feature affects the logits, and that never predicts an end token."""
    return stir(GPT.create(config, compute_dtype=dtype).eval(), 0.2)


@pytest.fixture(scope="module")
def models() -> dict[str, GPT]:
    return {name: make_model(config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def engine(models: dict[str, GPT]) -> Engine:
    return Engine(models["later"], TOKENIZER)


@torch.no_grad()
def naive_greedy(model: GPT, prompt: list[int], max_tokens: int) -> list[int]:
    """The most likely continuation, by a full forward pass per token."""
    ids = list(prompt)
    while len(ids) < min(model.config.sequence_len, len(prompt) + max_tokens):
        token = int(model(torch.tensor([ids]))[0, -1].argmax())
        if token in (END, BOS):
            break
        ids.append(token)
    return ids


@functools.cache
def greedy_once(model: GPT, prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    return naive_greedy(model, list(prompt), max_tokens)


def scripted(*parts: str | int, **kwargs: Any) -> Engine:
    return Engine(Scripted(chain(START, *parts), **kwargs), TOKENIZER)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------
# The numbers


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [1, 2, 9, 30, 31])
def test_greedy_is_greedy_without_a_cache(models: dict[str, GPT], name: str, length: int) -> None:
    prompt = [BOS, *range(60, 60 + length - 1)]
    sequences, masks = Engine(models[name], TOKENIZER).generate_batch(prompt, temperature=0.0)
    assert sequences == [naive_greedy(models[name], prompt, 99)]
    assert len(masks[0]) == len(sequences[0]) <= 32


@pytest.mark.parametrize("batch_size", [2, 5, 50])
def test_many_prompts_in_few_batch_slots(models: dict[str, GPT], batch_size: int) -> None:
    """More prompts than batch slots, of all lengths: sequences join and leave without affecting each other."""
    prompts = [[BOS, *((7 * i + j) % 250 for j in range(3 * i % 28))] for i in range(11)]
    for name, model in models.items():
        got = answers(Engine(model, TOKENIZER), prompts, max_tokens=9, temperature=0.0, batch_size=batch_size)
        assert [p + a for p, a in zip(prompts, got)] == [greedy_once(model, tuple(p), 9) for p in prompts], name


@pytest.mark.parametrize("chunk", [1, 2, 5, 16])
def test_prefill_in_chunks_changes_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    prompt = [BOS, *range(20)]
    whole = engine.generate_batch(prompt, num_samples=3, max_tokens=8)
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", chunk)
    assert engine.generate_batch(prompt, num_samples=3, max_tokens=8) == whole


def test_a_sample_does_not_depend_on_its_batch(engine: Engine) -> None:
    prompts = [[BOS, 50 + i] for i in range(9)]
    kwargs: dict[str, Any] = {"max_tokens": 12, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 5}
    alone = answers(engine, prompts, batch_size=1, **kwargs)
    assert answers(engine, prompts, batch_size=4, **kwargs) == alone
    assert answers(engine, prompts[:3], batch_size=9, **kwargs) == alone[:3]


def test_samples_differ_from_the_first_token_on(engine: Engine) -> None:
    columns = list(engine.generate([BOS, 65], num_samples=16, max_tokens=6, seed=1))
    assert len(set(columns[0][0])) > 8
    assert len({tuple(column[i] for column, _ in columns) for i in range(16)}) == 16


def test_first_tokens_follow_the_model(engine: Engine, models: dict[str, GPT]) -> None:
    n = 4000
    first, _ = next(engine.generate([BOS, 65], num_samples=n, max_tokens=1, top_k=5, seed=3))
    logits = models["later"](torch.tensor([[BOS, 65]]))[0, -1].double()
    best = logits.topk(5)
    for token, p in zip(best.indices.tolist(), best.values.softmax(0).tolist()):
        assert abs(first.count(token) - n * p) < 5 * (n * p * (1 - p)) ** 0.5
    assert set(first) <= set(best.indices.tolist())


def test_seeds(engine: Engine) -> None:
    def sample(**kwargs: Any) -> list[list[int]]:
        return engine.generate_batch([BOS, 65], max_tokens=8, **kwargs)[0]

    assert sample(seed=1, num_samples=3) == sample(seed=1, num_samples=3)
    assert sample(seed=1, num_samples=3)[:1] == sample(seed=1)
    assert len({tuple(sample(seed=s)[0]) for s in (-2, -1, 0, 1, 2)}) == 5


def test_generation_does_not_affect_training(models: dict[str, GPT]) -> None:
    model = make_model(CONFIGS["later"]).train()
    Engine(model, TOKENIZER).generate_batch([BOS, 65], max_tokens=4)
    ids = torch.arange(12).view(1, 12)
    model(ids, ids).backward()
    assert model.training and all(p.grad is not None for p in model.parameters())


# ---------------------------------------------------------------------------------------------------
# Ends, limits and errors


def test_sequences_end_independently() -> None:
    model = Scripted({ord("a"): ord("b"), ord("b"): ord("c"), ord("x"): BOS})
    engine = Engine(model, TOKENIZER)  # type: ignore[arg-type]
    rows = complete(engine, [[ord("a")], [ord("x")], [ord("b")], [ord("c")]])
    assert [row.tokens for row in rows] == [[*b"bc"], [], [*b"c"], []]
    assert [row.end for row in rows] == [END, BOS, END, END]
    assert [len(step) for step in model.fed] == [1, 1, 1, 1, 2, 1]  # four prompts; then two rows, then one


def test_finished_samples_repeat_the_end_token_until_all_are_done() -> None:
    model = Scripted({})
    model.table[START, [END, ord("a")]] = 20.0  # the first token is either of two
    columns = list(Engine(model, TOKENIZER).generate([START], num_samples=8))  # type: ignore[arg-type]
    assert len(columns) == 2
    for (first, second), (first_mask, second_mask) in zip(zip(*(c for c, _ in columns)), zip(*(m for _, m in columns))):
        assert (first, second, first_mask, second_mask) in [(END, END, 1, 0), (ord("a"), END, 1, 1)]
    assert {END, ord("a")} == set(columns[0][0])


@pytest.mark.parametrize("max_tokens", [0, 1, 5, None])
def test_max_tokens(engine: Engine, max_tokens: int | None) -> None:
    steps = len(list(engine.generate([BOS, 1, 2], max_tokens=max_tokens, temperature=0.0)))
    assert steps == (29 if max_tokens is None else max_tokens)


def test_a_prompt_that_fills_the_context_gets_an_empty_answer(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(engine.generate([BOS] * 32)) == []
    assert engine.generate_batch([BOS] * 32, num_samples=2) == ([[BOS] * 32] * 2, [[0] * 32] * 2)
    assert [len(a) for a in answers(engine, [[BOS] * 32, [BOS] * 31, [BOS] * 99], temperature=0.0)] == [0, 1, 0]
    warning = capsys.readouterr().err
    assert "2 of 3" in warning and "32" in warning
    assert answers(engine, []) == []


@pytest.mark.parametrize(
    ("tokens", "kwargs", "words"),
    [
        ([], {}, "empty"),
        ([BOS] * 33, {}, "33"),
        ([BOS], {"num_samples": 0}, "num_samples"),
        ([BOS], {"max_tokens": -1}, "max_tokens"),
        ([BOS], {"temperature": -1.0}, "temperature"),
        ([BOS], {"top_k": -5}, "top_k"),
        ([BOS], {"top_p": 2.0}, "top_p"),
    ],
)
def test_wrong_arguments_raise_before_iteration(
    engine: Engine, tokens: list[int], kwargs: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        engine.generate(tokens, **kwargs)  # not even iterated


def test_wrong_arguments_of_complete(engine: Engine) -> None:
    with pytest.raises(ValueError, match="empty"):
        complete(engine, [[BOS], []])
    with pytest.raises(ValueError, match="batch_size"):
        complete(engine, [[BOS]], batch_size=0)


def test_where_memory_is_too_small_fewer_are_decoded_at_a_time(
    models: dict[str, GPT], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, sizes = Engine(models["later"], TOKENIZER), []
    prompts = [[BOS, i] for i in range(20)]
    expected = answers(engine, prompts, seed=3, max_tokens=6)
    step = RunningBatch.step

    def limited(batch: RunningBatch) -> Any:
        sizes.append(batch.cache.batch_size)
        if batch.cache.batch_size > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        return step(batch)

    monkeypatch.setattr(RunningBatch, "step", limited)
    for _ in range(2):
        assert answers(engine, prompts, seed=3, max_tokens=6) == expected
    assert list(dict.fromkeys(sizes)) == [20, 10, 5] and engine.max_batch == 5
    assert capsys.readouterr().err.count("not enough memory") == 2

    def full(batch: RunningBatch) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(RunningBatch, "step", full)
    with pytest.raises(torch.OutOfMemoryError):  # one sequence does not fit either
        answers(engine, prompts)


@pytest.mark.parametrize("top_k", [0, None, 265, 10_000])
def test_top_k_may_be_off_or_beyond_the_vocabulary(engine: Engine, top_k: int | None) -> None:
    assert engine.generate_batch([BOS], max_tokens=5, top_k=top_k) == engine.generate_batch([BOS], max_tokens=5)


# ---------------------------------------------------------------------------------------------------
# The calculator


def tool_session() -> ToolSession:
    return ToolSession(ToolTable(TOKENIZER))


def test_a_result_is_forced_after_an_expression() -> None:
    engine = scripted("Sum: ".replace(" ", ""), PYTHON, "12*3", PYTHON_END)
    engine.model.table[OUTPUT_END, :] = -20.0
    engine.model.table[OUTPUT_END, ord("!")] = 20.0
    (tokens,), (mask,) = engine.generate_batch([BOS, START])
    said, forced = [*b"Sum:", PYTHON, *b"12*3", PYTHON_END], [OUTPUT, *b"36", OUTPUT_END]
    assert tokens == [BOS, START, *said, *forced, ord("!")]
    assert mask == [0, 0] + [1] * len(said) + [0] * len(forced) + [1]


@pytest.mark.parametrize(
    ("expression", "shown"),
    [("1/2", "0.5"), ("84/7", "12"), ("'abc'.", None), ("2**", None), ("9//0", None), ("ü+1", None), ("", None)],
)
def test_the_result_of_an_expression_is_forced(expression: str, shown: str | None) -> None:
    tools = tool_session()
    for token in [PYTHON, *TOKENIZER.encode(expression), PYTHON_END]:
        tools.observe(token, room=99)
    assert list(tools.forced) == ([] if shown is None else [OUTPUT, *shown.encode(), OUTPUT_END])


@pytest.mark.parametrize(
    "ids",
    [[PYTHON_END], [*b"1+1", PYTHON_END], [PYTHON, *b"1+1"], [OUTPUT, *b"1", OUTPUT_END], [PYTHON, *b"1+1", PYTHON]],
)
def test_an_incomplete_call_is_not_run(ids: list[int]) -> None:
    tools = tool_session()
    for token in ids:
        tools.observe(token, room=99)
    assert not tools.forced


def test_a_second_start_token_restarts_the_call() -> None:
    tools = tool_session()
    for token in [PYTHON, *b"7", PYTHON, *b"1+1", PYTHON_END]:
        tools.observe(token, room=99)
    assert list(tools.forced) == [OUTPUT, ord("2"), OUTPUT_END]


def test_a_refused_expression_forces_nothing() -> None:
    engine = scripted(PYTHON, "os.x", PYTHON_END, "?")
    (tokens,), (mask,) = engine.generate_batch([START])
    assert tokens == [START, PYTHON, *b"os.x", PYTHON_END, ord("?")] and mask == [0] + [1] * 7


@pytest.mark.parametrize("limit", range(1, 12))
def test_forced_tokens_count_towards_the_limit(limit: int) -> None:
    answer = [PYTHON, *b"12*3", PYTHON_END, OUTPUT, *b"36", OUTPUT_END]
    engine = scripted(PYTHON, "12*3", PYTHON_END)
    assert engine.generate_batch([START], max_tokens=limit)[0] == [[START, *answer[:limit]]]
    small = scripted(PYTHON, "12*3", PYTHON_END, sequence_len=limit + 1)
    assert small.generate_batch([START])[0] == [[START, *answer[:limit]]]


def test_every_sequence_has_its_own_tool_session() -> None:
    """Sequences at different positions of the same call, in one batch."""
    follows = chain(*b"abcdefgh") | chain(PYTHON, "1+2", PYTHON_END) | {ord("h"): PYTHON, OUTPUT_END: END}
    engine = Engine(Scripted(follows), TOKENIZER)  # type: ignore[arg-type]
    starts = b"ahcgbf"
    tail = [PYTHON, *b"1+2", PYTHON_END, OUTPUT, ord("3"), OUTPUT_END]
    rows = complete(engine, [[s] for s in starts], batch_size=4)
    assert [row.tokens for row in rows] == [[*b"abcdefgh"[s - ord("a") + 1 :], *tail] for s in starts]
    assert all(row.mask[-3:] == [0, 0, 0] and 0 not in row.mask[:-3] for row in rows)


def test_generation_from_several_threads(engine: Engine) -> None:
    """Concurrent generations with tool calls, none on the main thread."""
    tool = scripted(PYTHON, "12*3", PYTHON_END)

    def work(i: int) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        return engine.generate_batch([BOS, i], num_samples=2, max_tokens=6), tool.generate_batch([START])

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(work, range(8)))
    assert [a for a, _ in got] == [engine.generate_batch([BOS, i], num_samples=2, max_tokens=6) for i in range(8)]
    assert all(b == tool.generate_batch([START]) and OUTPUT in b[0][0] for _, b in got)


# ---------------------------------------------------------------------------------------------------
# The running batch


def make_batch(engine: Engine, max_rows: int) -> RunningBatch:
    return RunningBatch(engine.weights, engine.tools, engine.end_tokens, max_rows, 32)


def test_a_long_prompt_does_not_delay_running_sequences(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one prefill chunk per step, running sequences get a token every step."""
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", 4)
    batch, first, late = make_batch(engine, 2), sequence([BOS, 1]), sequence([BOS, *range(17)])
    batch.submit([first])
    steps = [[token.sequence for token in batch.step(prefill_chunks=1)]]
    batch.submit([late])
    while not batch.idle:
        steps.append([token.sequence for token in batch.step(prefill_chunks=1)])
    assert steps[:5] == [[first]] * 5 and steps[5] == [first, late]  # 18 tokens are five chunks
    for row in (first, late):
        assert row.prompt + row.tokens == naive_greedy(engine.model, row.prompt, 10)


def test_samples_of_a_request_prefill_its_prompt_once() -> None:
    model = Scripted(chain("abc"))
    requests = [GenerationRequest([*b"xa"], 9, num_samples=5), GenerationRequest([*b"ya"], 9)]
    Engine(model, TOKENIZER).complete(requests, batch_size=2)  # type: ignore[arg-type]
    assert [step for step in model.fed if len(step[0]) == 2] == [[[*b"xa"]], [[*b"ya"]]]


def test_cancelling_running_prefilling_and_waiting_sequences(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", 4)
    batch = make_batch(engine, 2)
    rows = [sequence([BOS, *range(40 * i, 40 * i + 9 + i)], index=i) for i in range(5)]
    for row in rows:
        batch.submit([row])
    batch.step()
    assert batch.running == rows[:2]
    batch.cancel(rows[0])  # running
    assert batch.running == [rows[1]]
    batch.step(prefill_chunks=1)
    batch.cancel(rows[2])  # its prompt is half prefilled
    batch.cancel(rows[4])  # waiting
    while not batch.idle:
        batch.step()
    assert [len(row.tokens) for row in rows] == [1, 10, 0, 10, 0]
    for row in (rows[1], rows[3]):
        assert row.prompt + row.tokens == naive_greedy(engine.model, row.prompt, 10)


# ---------------------------------------------------------------------------------------------------
# Weights


def test_decoding_weights_give_the_same_logits() -> None:
    model = make_model(CONFIGS["later"], torch.bfloat16)
    copy = DecodingWeights(model).current()
    assert {p.dtype for p in copy.parameters() if p.dim() > 1} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = torch.arange(30).view(2, 15)
    assert torch.equal(copy(ids), model(ids))
    plain = make_model(CONFIGS["later"])
    assert DecodingWeights(plain).current() is plain


def test_decoding_weights_follow_the_optimizer() -> None:
    model = make_model(CONFIGS["later"], torch.bfloat16).train()
    weights, ids = DecodingWeights(model), torch.arange(30).view(2, 15)
    optimizer = MuonAdamW(build_param_groups(model, OptimizerConfig(), ns_dtype=torch.float32))
    before, copy = weights.current()(ids), weights.current()
    for _ in range(2):
        model(ids, ids).backward()
        optimizer.step()
        model.zero_grad()
        assert weights.current() is copy and torch.equal(copy(ids), model(ids))
    assert not torch.equal(copy(ids), before)


# ---------------------------------------------------------------------------------------------------
# Text


@given(st.text(max_size=40))
@settings(max_examples=50, deadline=None)
def test_streaming_never_splits_a_character(text: str) -> None:
    stream = AnswerStream(TOKENIZER, chat=False)
    pieces = [piece for token in text.encode(errors="ignore") for _, piece in stream.feed(token)]
    assert "".join(pieces) == text.encode(errors="ignore").decode() and stream.finish() == []
    assert all(len(piece) <= 1 for piece in pieces)  # a byte completes at most one character


def test_an_incomplete_character_becomes_a_replacement_character() -> None:
    stream = AnswerStream(TOKENIZER, chat=False)
    assert [stream.feed(byte) for byte in "€".encode()[:2]] == [[], []]
    assert stream.finish() == [("text", "\N{REPLACEMENT CHARACTER}")] and stream.feed(65) == [("text", "A")]


def test_text_of_a_base_model_has_special_tokens_by_name() -> None:
    stream = AnswerStream(TOKENIZER, chat=False)
    assert stream.feed(BOS) == [("text", "<|bos|>")] and stream.feed(65) == [("text", "A")]


TOKENS = st.one_of(st.integers(0, 255), st.sampled_from(sorted(set(SPECIAL.values()) - {BOS, END})))


def joined(parts: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The (kind, text) parts, neighbours of one kind as one."""
    return [(kind, "".join(text for _, text in run)) for kind, run in groupby(parts, key=lambda part: part[0])]


@given(st.lists(TOKENS, max_size=30))
@settings(max_examples=100, deadline=None)
def test_streaming_an_answer_equals_parsing_it(ids: list[int]) -> None:
    stream = AnswerStream(TOKENIZER)
    pieces = [piece for token in ids for piece in stream.feed(token)] + stream.finish()
    parsed = parse_answer(TOKENIZER, ids)
    whole = [("text", parsed)] * bool(parsed) if isinstance(parsed, str) else [(p["type"], p["text"]) for p in parsed]
    assert joined(pieces) == joined(whole)


def test_a_tool_result_without_text_is_a_piece() -> None:
    sample, sequence = Sample(TOKENIZER, stop=["x"]), TokenSequence(GenerationRequest([BOS], 99))
    for token in [PYTHON, 65, PYTHON_END, OUTPUT, OUTPUT_END, PYTHON, 66, PYTHON_END]:
        sample.feed(Token(sequence, token, mask=1))
    sample.finish()
    assert sample.pieces == [("python", "A"), ("python_output", ""), ("python", "B")]
