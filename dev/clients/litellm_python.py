"""litellm, which most proxies and agents call models through."""

import litellm
from cells import AFTER_CALL, API, HI, LONG_CHAT, MODEL, SCHEMA, TOOL, check, check_person, expect, run

litellm.suppress_debug_info = True


def ask(**changes):
    request = {"model": f"openai/{MODEL}", "api_base": API, "api_key": "none", "messages": HI, "temperature": 0}
    return litellm.completion(**{**request, **changes}, num_retries=0)


def chat():
    check(ask().choices[0].message.content, ask())


def stream():
    text = "".join(c.choices[0].delta.content or "" for c in ask(stream=True))
    check(text == ask().choices[0].message.content, text)


def tools():
    check(not ask(tools=[TOOL]).choices[0].message.tool_calls, "a tool call")
    check(ask(messages=AFTER_CALL).choices[0].finish_reason, "after a call")
    expect(litellm.BadRequestError, lambda: ask(tools=[TOOL], tool_choice="required"), "tool_choice")


def structured():
    import json

    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    check_person(json.loads(ask(response_format=schema).choices[0].message.content))


def max_tokens():
    check(ask(max_tokens=32_000).choices[0].message.content, "empty")


def errors():
    expect(litellm.ContextWindowExceededError, lambda: ask(messages=LONG_CHAT))
    expect(litellm.NotFoundError, lambda: ask(model="openai/gpt-4o"), "gpt-4o")


run(globals())
