"""Conversations as data sets write them, brought into the form of nanochat/conversation.py.

    messages, or a bare list     [{"role": "user", "content": "Hi"}, …], also with content as a list of text parts
    ShareGPT                     {"conversations": [{"from": "human", "value": "Hi"}, …]}
    Alpaca and its relatives     {"instruction": …, "input": …, "output": …}, with "system" and "history" if given
    prompt and completion        {"prompt": …, "completion": …}, texts or lists of messages; also as items of a list

Fields without a meaning here (an id, a source) are ignored. What would be lost, such as a picture or a function call,
is an error.
"""

import json
from collections.abc import Iterable
from itertools import chain
from typing import Any

from nanochat.conversation import PART_TOKENS, Conversation, Message, merge_messages, validate_conversation

LISTS = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "prompt", "question", "query", "inputs", "input")  # the last: a context beside the others
CONTEXTS = ("input", "context")
ANSWERS = ("output", "completion", "response", "answer", "targets")
SYSTEMS = ("system", "system_prompt")
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "developer": "system",
}
TEXT_TYPES = ("text", "input_text", "output_text")


def to_conversation(row: Any) -> Conversation:
    """The conversation that `row`, a parsed line of JSON or a row of a table, stands for.

    Raises ValueError, with the reason in one line, if it is none, or has nothing to train on.
    """
    found = chain.from_iterable(messages_of(item) if is_exchange(item) else [item] for item in messages_of(row))
    messages = [plain_message(number, message) for number, message in enumerate(found, 1)]
    try:
        validate_conversation({"messages": messages}, for_training=True)
    except ValueError:
        if not messages or not all(is_mergeable(message) for message in messages):
            raise
        merged = merge_messages(messages)
        messages = [{key: value for key, value in message.items() if key != "merged"} for message in merged]
        validate_conversation({"messages": messages}, for_training=True)
    return {"messages": messages}


def is_mergeable(message: Message) -> bool:
    """Whether messages such as this one may be merged, so that the roles alternate."""
    known = message.get("role") in ("system", "user", "assistant") and isinstance(message.get("content"), str | list)
    return known and bool(message["content"] or message["role"] != "assistant") and message.get("weight") is None


def is_message(value: Any) -> bool:
    """Whether this is a single message rather than a conversation."""
    return isinstance(value, dict) and bool({"role", "from"} & set(value)) and not set(LISTS) & set(value)


def is_exchange(value: Any) -> bool:
    """Whether this item of a list of messages is a question with its answer."""
    return isinstance(value, dict) and not is_message(value) and bool(set(ANSWERS) & set(value))


def messages_of(row: Any) -> list[Any]:
    """The messages of a row of any format, as they are."""
    if isinstance(row, list):
        return row
    if not isinstance(row, dict):
        raise ValueError(f"a conversation is a list of messages or an object, not {type(row).__name__}")
    fields = {name: value for name, value in row.items() if value not in (None, "")}
    if name := only(fields, LISTS):
        messages = as_messages(fields[name], "")
    elif (answer := only(fields, ANSWERS)) and (question := only(fields, QUESTIONS[:-1]) or only(fields, QUESTIONS)):
        messages = exchange(fields, question, answer)
    else:
        found = ", ".join(map(repr, fields)) or "nothing"
        raise ValueError(f"no conversation: it needs 'messages', or 'prompt' and 'completion'; found {found}")
    if (system := only(fields, SYSTEMS)) and not (is_message(messages[0]) and fields[system] in messages[0].values()):
        messages = [*as_messages(fields[system], "system"), *messages]
    return messages


def exchange(fields: dict[str, Any], question: str, answer: str) -> list[Any]:
    """The messages of a question and its answer, after the exchanges of "history"."""
    asked = fields[question]
    context = only(fields, [name for name in CONTEXTS if name != question])
    if context:
        if not isinstance(asked, str) or not isinstance(fields[context], str):
            raise ValueError(f"{question!r} and {context!r} must be strings")
        asked = f"{asked}\n\n{fields[context]}"
    messages = []
    history = fields.get("history", [])
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError("'history' must be a list of pairs: a question and its answer")
        messages += [*as_messages(pair[0], "user"), *as_messages(pair[1], "assistant")]
    return [*messages, *as_messages(asked, "user"), *as_messages(fields[answer], "assistant")]


def only(fields: dict[str, Any], names: Iterable[str]) -> str:
    """The one of `names` that is a field; "" if none is. ValueError if several are: which is meant?"""
    present = [name for name in names if name in fields]
    if len(present) > 1:
        raise ValueError(f"it has both {present[0]!r} and {present[1]!r}: leave one out")
    return present[0] if present else ""


def as_messages(value: Any, role: str) -> list[Any]:
    """A list of messages, also one written as JSON in a string; with a role, a text becomes one message of it."""
    if isinstance(value, str):
        if role:
            return [{"role": role, "content": value}]
        try:
            value = json.loads(value)  # a column of a table
        except ValueError:
            raise ValueError(f"expected a list of messages, found the text {value[:40]!r}") from None
    if not isinstance(value, list):
        raise ValueError(f"expected {'a text or ' if role else ''}a list of messages, found {type(value).__name__}")
    if not value:
        raise ValueError("'messages' is empty")
    return value


def plain_message(number: int, message: Any) -> Message:
    """The message with a "role" and "content" of ours; its other fields stay. Errors that remain are validation's."""
    if not isinstance(message, dict):
        raise ValueError(f"message {number} must be an object with 'role' and 'content', not {type(message).__name__}")
    plain = dict(message)
    if plain.get("role") is None and "from" in plain:  # in a table, the fields of all formats may stand side by side
        plain = {key: value for key, value in plain.items() if value is not None}
        plain |= {name: plain.pop(key) for key, name in (("from", "role"), ("value", "content")) if key in plain}
    if plain.get("tool_calls") or plain.get("function_call"):
        raise ValueError(f"message {number} calls a function; the tools known here are parts of the content")
    role, content = plain.get("role"), plain.get("content")
    if isinstance(role, str):
        plain["role"] = role = ROLES.get(role.lower(), role.lower())
    if isinstance(content, list):
        plain["content"] = plain_content(content, role, f"message {number}")
    return plain


def plain_content(content: list[Any], role: Any, where: str) -> Any:
    """A list of text parts as one string; an assistant's list of our own parts as it is."""
    kinds = [part.get("type") if isinstance(part, dict) else None for part in content]
    if role == "assistant" and all(kind in PART_TOKENS for kind in kinds):
        return content
    if other := [kind for kind in kinds if kind not in TEXT_TYPES]:
        raise ValueError(f"{where}: a part of type {other[0]!r} cannot be learnt; text can")
    texts = [part.get("text") for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: a text part needs a string 'text'")
    return "".join(texts)
