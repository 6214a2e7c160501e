"""The requests that Open WebUI's backend sends, rebuilt from its source: not the program itself."""

import json
import urllib.error
import urllib.request

from cells import API, HI, LONG_CHAT, MODEL, SCHEMA, TOOL, check, check_person, run

EXTRAS = {"model": MODEL, "temperature": 0, "user": "someone"}


def post(body, path="/chat/completions"):
    headers = {"Content-Type": "application/json", "Authorization": "Bearer ", "X-OpenWebUI-User-Name": "A"}
    request = urllib.request.Request(API + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def text(**changes):
    status, body = post({**EXTRAS, "messages": HI, "stream": False, **changes})
    check(status == 200, body)
    return json.loads(body)["choices"][0]["message"]["content"]


def chat():
    with urllib.request.urlopen(f"{API}/models") as response:
        check(json.load(response)["data"][0]["id"] == MODEL, "models")
    title = (
        "### Task:\nGenerate a concise, 3-5 word title with an emoji.\n### Chat History:\nUSER: hi\nASSISTANT: hello"
    )
    check(text(messages=[{"role": "user", "content": title}], max_completion_tokens=1000), "no title")


def stream():
    body = {**EXTRAS, "messages": HI, "stream": True, "stream_options": {"include_usage": True}}
    lines = [line[6:] for line in post(body)[1].splitlines() if line.startswith("data: ")]
    check(lines[-1] == "[DONE]", lines[-1])
    chunks = [json.loads(line) for line in lines[:-1]]
    check(chunks[-1]["usage"]["completion_tokens"], chunks[-1])
    streamed = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
    check(streamed == text(), streamed)


def tools():
    check(text(tools=[TOOL]), "empty")


def structured():
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    check_person(json.loads(text(response_format=schema)))


def max_tokens():
    every = {"frequency_penalty": 0.1, "presence_penalty": 0.1, "reasoning_effort": "low", "seed": 1, "stop": ["###"]}
    check(text(max_tokens=32_000, top_k=40, top_p=0.9, min_p=0.0, logit_bias={"5": -1}, **every), "empty")


def errors():
    status, body = post({**EXTRAS, "messages": LONG_CHAT})
    check(status == 400 and "maximum context length" in json.loads(body)["error"]["message"], body)


run(globals())
