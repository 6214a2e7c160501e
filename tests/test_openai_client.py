"""OpenAI's Python client against a real socket: every call that a program written for OpenAI makes."""

import asyncio
import enum
import threading
from collections.abc import Iterator
from typing import Any, Literal

import pydantic
import pytest
from live import Live
from serve_helpers import MODEL, TOKENIZER, app_of

from nanochat.engine import Engine
from nanochat.serve.api import Settings

openai = pytest.importorskip("openai")

HI: list[Any] = [{"role": "user", "content": "hi"}]
SETTINGS = Settings(api_keys=["key"], request_seconds=90, drain_seconds=2)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with Live(app_of(SETTINGS)) as made:
        yield made


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="key", max_retries=0, timeout=90) as made:
        yield made


def ask(client: Any, **changes: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "nanochat", "messages": HI, "seed": 7, "max_tokens": 20, **changes}
    )


def test_a_chat_whole_and_streamed(client: Any) -> None:
    whole = ask(client)
    assert whole.model == "nanochat" and whole.choices[0].message.role == "assistant"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    text, reasons, usage = "", [], None
    for chunk in ask(client, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert text == whole.choices[0].message.content and text
    assert reasons == [whole.choices[0].finish_reason] and usage is not None
    assert usage.model_dump() == whole.usage.model_dump()


def test_concurrent_requests(client: Any, live: Live) -> None:
    """The asynchronous client: concurrent answers equal single ones."""

    async def gather() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="key", max_retries=0) as many:
            answers = await asyncio.gather(*(ask(many, seed=seed) for seed in range(12)))
            return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(gather()) == [ask(client, seed=seed).choices[0].message.content for seed in range(12)]


def test_samples_seeds_and_stops(client: Any) -> None:
    answers = [choice.message.content for choice in ask(client, n=3).choices]
    assert len(set(answers)) == 3
    assert answers == [choice.message.content for choice in ask(client, n=3).choices]
    assert answers != [choice.message.content for choice in ask(client, n=3, seed=8).choices]
    letter = next(c for c in answers[0][2:] if c.isalnum())
    stopped = ask(client, stop=letter).choices[0]
    assert stopped.finish_reason == "stop" and stopped.message.content == answers[0].partition(letter)[0]
    assert ask(client, temperature=0, extra_body={"top_k": 1}).choices[0].message.content


def test_log_probabilities(client: Any) -> None:
    whole = ask(client, logprobs=True, top_logprobs=3).choices[0]
    content = whole.logprobs.content
    assert content and all(t.logprob <= 0 and len(t.top_logprobs) == 3 for t in content)
    assert all(t.top_logprobs[0].logprob >= t.top_logprobs[1].logprob for t in content)
    streamed = [
        entry
        for chunk in ask(client, logprobs=True, top_logprobs=3, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content
    ]
    assert streamed == content


class Pet(pydantic.BaseModel):
    """Descriptions, references, enumerations and nulls, as the client writes their schema."""

    class Kind(enum.Enum):
        CAT = "cat"
        DOG = "dog"

    kind: Kind
    legs: Literal[3, 4]
    tame: bool | None = pydantic.Field(description="None is unknown")
    eats: list[Kind] = pydantic.Field(max_length=1)


def test_structured_output(client: Any) -> None:
    """`parse`: the client makes the schema of a pydantic model, and the model of the answer."""
    settings = {"model": "nanochat", "messages": HI, "response_format": Pet, "logit_bias": {"10": -100, "32": -100}}
    answers = [client.chat.completions.parse(**settings, seed=seed).choices[0] for seed in range(3)]
    assert all(isinstance(answer.message.parsed, Pet) for answer in answers)
    with client.chat.completions.stream(**settings, seed=0) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == answers[0].message.content


def test_completions(client: Any) -> None:
    body: dict[str, Any] = {"model": "nanochat", "prompt": ["abc", "b"], "max_tokens": 5, "temperature": 0}
    whole = client.completions.create(**body)
    expected, _ = Engine(MODEL, TOKENIZER).generate_batch([256, *b"abc"], 1, max_tokens=5, temperature=0.0)
    assert whole.choices[0].text == TOKENIZER.decode(expected[0][4:]) and len(whole.choices) == 2
    texts = ["", ""]
    for chunk in client.completions.create(**body, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    echoed = client.completions.create(model="nanochat", prompt="abc", max_tokens=0, echo=True, logprobs=2).choices[0]
    assert echoed.text == "abc" and len(echoed.logprobs.token_logprobs) == 3
    assert all(1 <= len(top) <= 2 for top in echoed.logprobs.top_logprobs)  # tokens with the same text are merged


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["nanochat"]
    assert client.models.retrieve("nanochat").owned_by == "nanochat"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_errors_map_to_client_exceptions(client: Any, live: Live) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, temperature=-1)
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, messages=[{"role": "user", "content": "x" * 99}])
    assert bad.value.param == "messages" and bad.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, model="gpt-9")
    assert missing.value.code == "model_not_found"
    stranger = openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as wrong:
        ask(stranger)
    assert wrong.value.code == "invalid_api_key"


@pytest.mark.parametrize("base", ["", "/v1/v1"])
def test_wrong_base_urls_are_named(live: Live, base: str) -> None:
    with openai.OpenAI(base_url=live.url + base, api_key="key", max_retries=0, timeout=90) as client:
        calls = (
            lambda: client.models.list(),
            lambda: ask(client),
            lambda: ask(client, stream=True),
            lambda: client.completions.create(model="nanochat", prompt="x"),
        )
        for call in calls:
            with pytest.raises((openai.NotFoundError, openai.BadRequestError), match="/v1"):
                call()


def test_long_chats_tools_and_prefills(client: Any) -> None:
    turns = [{"role": role, "content": "x" * 20} for role in ("user", "assistant")]
    raw = client.chat.completions.with_raw_response.create(
        model="nanochat", messages=[*turns, *turns, *HI], max_tokens=32_000, temperature=0
    )
    answer = raw.parse()
    assert raw.headers["x-nanochat-dropped-messages"] == "2" and answer.usage.dropped_messages == 2
    assert answer.choices[0].finish_reason == "length" and answer.usage.total_tokens == 64
    call = {"id": "a", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "1+1"}'}}
    called = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert (
        ask(client, messages=[*called, {"role": "tool", "tool_call_id": "a", "content": "2"}]).usage.prompt_tokens == 14
    )
    begun = [*HI, {"role": "assistant", "content": "So"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    assert ask(client, messages=begun, extra_body=extra).usage.prompt_tokens == 8
    with pytest.raises(openai.BadRequestError, match=r"messages\.1"):
        ask(client, messages=begun)


def test_client_retries_when_the_server_is_busy(client: Any, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client raises RateLimitError; with retries it tries again by itself."""
    monkeypatch.setattr(SETTINGS, "max_requests", 0)
    with pytest.raises(openai.RateLimitError) as busy:
        ask(client)
    assert int(busy.value.response.headers["retry-after"]) >= 1 and busy.value.code == "server_busy"
    patient = client.with_options(max_retries=1)
    timer = threading.Timer(0.3, lambda: setattr(SETTINGS, "max_requests", 10))
    timer.start()
    assert ask(patient).choices[0].message.content
    timer.join()
