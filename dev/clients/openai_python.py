"""openai for Python: chat completions and, under the same columns, responses."""

import json

import openai
from cells import AFTER_CALL, API, HI, LONG_CHAT, MODEL, SCHEMA, TOOL, check, check_person, expect, run
from pydantic import BaseModel, Field

client = openai.OpenAI(base_url=API, api_key="none", max_retries=0)


def ask(**changes):
    return client.chat.completions.create(**{"model": MODEL, "messages": HI, "temperature": 0, **changes})


def respond(**changes):
    return client.responses.create(**{"model": MODEL, "input": "What is 12 + 30?", "temperature": 0, **changes})


def chat():
    answer = ask()
    check(answer.choices[0].message.content and answer.usage.completion_tokens, answer)
    check(respond().output_text == answer.choices[0].message.content, respond())


def stream():
    text = "".join(c.choices[0].delta.content or "" for c in ask(stream=True) if c.choices)
    check(text == ask().choices[0].message.content, text)
    events = list(respond(stream=True))
    check(events[-1].type in ("response.completed", "response.incomplete"), events[-1])
    check("".join(e.delta for e in events if e.type == "response.output_text.delta") == text, events)


def tools():
    check(ask(tools=[TOOL], tool_choice="auto").choices[0].message.tool_calls is None, "a tool call")
    check(ask(messages=AFTER_CALL).choices[0].finish_reason, "after a call")
    expect(openai.BadRequestError, lambda: ask(tools=[TOOL], tool_choice="required"), "tool_choice")


class Person(BaseModel):
    model_config = {"extra": "forbid"}
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)


def structured():
    parsed = client.chat.completions.parse(model=MODEL, messages=HI, response_format=Person)
    check_person(parsed.choices[0].message.parsed.model_dump())
    check_person(client.responses.parse(model=MODEL, input="hi", text_format=Person).output_parsed.model_dump())
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    check_person(json.loads(ask(response_format=schema).choices[0].message.content))
    # An object of any shape may end at the token limit, which the client's own parser does not accept.
    check(ask(response_format={"type": "json_object"}).choices[0].message.content.startswith("{"), "not JSON")


def max_tokens():
    for number in (4096, 32_000):
        check(ask(max_tokens=number).choices[0].message.content == ask().choices[0].message.content, number)
    check(respond(max_output_tokens=32_000).output_text, "empty")


def errors():
    expect(openai.NotFoundError, lambda: ask(model="gpt-4o"), "gpt-4o")
    expect(openai.BadRequestError, lambda: ask(messages=LONG_CHAT), "maximum context length")
    expect(openai.BadRequestError, lambda: ask(extra_body={"temprature": 1}), "temprature")


run(globals())
