"""What the client checks share: run one function per column of dev/COMPATIBILITY.md, print the results as JSON.

A client's script defines some of the functions `chat`, `stream`, `tools`, `structured`, `max_tokens`, `errors`, which
raise where the client does not get what it should, and ends with `run(globals())`. It is called with the server's
address, http://HOST:PORT, and needs neither nanochat nor pytest, so that each client can have an environment of its
own.
"""

import json
import sys
import traceback
import urllib.request
from typing import Any

from columns import COLUMNS

URL = sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "http://localhost:8000"
API = f"{URL}/v1"
with urllib.request.urlopen(f"{API}/models") as models:
    MODEL: str = json.load(models)["data"][0]["id"]

HI = [{"role": "user", "content": "What is 12 + 30?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}
AFTER_CALL: list[dict[str, Any]] = [  # a chat in which another model called a tool
    *HI,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 12, "b": 30}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "42"},
]
TOO_LONG = "word " * 40_000
LONG_CHAT = [{"role": "user", "content": TOO_LONG}]


def check(holds: Any, what: Any) -> None:
    if not holds:
        raise AssertionError(what)


def check_person(value: Any) -> None:
    """Require what SCHEMA describes."""
    check(set(value) == {"name", "age"} and isinstance(value["name"], str) and 0 <= value["age"] <= 120, value)


def expect(kind: Any, call: Any, *words: str) -> None:
    """Require that the call raises `kind` with a text that has the words."""
    try:
        made = call()
    except kind as error:
        check(all(word in str(error) for word in words), f"{error!r} lacks {words}")
    else:
        raise AssertionError(f"no error, but {made!r}")


def run(functions: dict[str, Any]) -> None:
    """Print {column: "ok" or what failed} as the last line."""
    found = {}
    for column in COLUMNS:
        if column in functions:
            try:
                functions[column]()
                found[column] = "ok"
            except Exception as error:
                traceback.print_exc()
                found[column] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps(found))
