"""LangChain's ChatOpenAI."""

import openai
from cells import API, MODEL, SCHEMA, TOO_LONG, TOOL, check, check_person, expect, run
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI


def model(**changes):
    return ChatOpenAI(
        **{"model": MODEL, "base_url": API, "api_key": "none", "temperature": 0, "max_retries": 0, **changes}
    )


def chat():
    answer = model().invoke([SystemMessage("Be short."), HumanMessage("What is 12 + 30?")])
    check(answer.content and answer.usage_metadata["output_tokens"], answer)


def stream():
    chunks = list(model().stream("What is 12 + 30?"))
    check("".join(c.content for c in chunks) == model().invoke("What is 12 + 30?").content, chunks)


def tools():
    check(model().bind_tools([TOOL]).invoke("hi").tool_calls == [], "a tool call")
    call = {"id": "call_1", "name": "add", "args": {"a": 12, "b": 30}}
    messages = [HumanMessage("12 + 30?"), AIMessage("", tool_calls=[call]), ToolMessage("42", tool_call_id="call_1")]
    check(model().invoke(messages).response_metadata["finish_reason"], "after a call")
    forced = model().bind_tools([TOOL], tool_choice="any")
    expect(openai.BadRequestError, lambda: forced.invoke("hi"), "tool_choice")


def structured():
    schema = {"title": "person", "description": "A person", **SCHEMA}
    check_person(model().with_structured_output(schema, method="json_schema", strict=True).invoke("Ann is 7."))


def max_tokens():
    check(model(max_tokens=32_000).invoke("hi").content, "empty")


def errors():
    expect(openai.BadRequestError, lambda: model().invoke(TOO_LONG), "maximum context length")
    expect(openai.NotFoundError, lambda: model(model="gpt-4o").invoke("hi"), "gpt-4o")


run(globals())
