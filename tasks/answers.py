"""Conversations of one question, and extracting the final answer from a completion.

Only the final answer counts: text before a tool output and echoes of the question are ignored.
"""

import re
from decimal import Decimal, InvalidOperation
from typing import Any

from nanochat.conversation import Conversation, plain_text
from nanochat.inference.calculator import use_calculator

OUTPUT_END = "<|output_end|>"
ASSISTANT_END = "<|assistant_end|>"
# Decimals, with or without thousands separators. A sign belongs to the number only where no operand precedes it.
NUMBER = re.compile(r"(?:(?<![\w.])-)?\$?(?<![\d.])(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
OPERATOR_BEFORE = re.compile(
    r"(?:[+*/×÷^%-]|(?<![^\W\d])x|\b(?:plus|minus|times|by|and|from|into|add))\s*$", re.IGNORECASE
)
QUESTION_AFTER = re.compile(r"[^.!\n]*\?")


def exchange(question: str, answer: str | list[dict[str, str]], **extra: Any) -> Conversation:
    """A conversation of one question and its reference answer; `extra` is kept beside the messages for evaluate()."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **extra}


def calculator_call(expression: str, result: str | None = None) -> list[dict[str, str]]:
    """The two message parts of a calculator call.

    The output is the calculator's own (`4` where a data set says `4.00`), so that training matches inference;
    `result` is used for an expression that the calculator does not support.
    """
    value = use_calculator(expression)
    assert value is not None or result is not None, f"the calculator does not support {expression!r}"
    output = str(value) if value is not None else str(result)
    return [{"type": "python", "text": expression}, {"type": "python_output", "text": output}]


def reference_text(conversation: Conversation) -> str:
    """The reference answer: the text after the last tool output of the final assistant message."""
    content = conversation["messages"][-1]["content"]
    assert conversation["messages"][-1]["role"] == "assistant", "a task's conversation ends with the reference answer"
    if isinstance(content, str):
        return content
    last_tool = max((i for i, part in enumerate(content) if part["type"] != "text"), default=-1)
    return plain_text(content[last_tool + 1 :])


def final_text(conversation: Conversation, completion: str) -> str:
    """The completion's text after its last tool output and before the end of the turn, without echoed questions."""
    text = completion.split(ASSISTANT_END, 1)[0].rsplit(OUTPUT_END, 1)[-1]
    for message in conversation["messages"]:
        if message["role"] == "user" and (question := plain_text(message["content"]).strip()):
            text = text.replace(question, " ")
    return text.strip()


def parse_number(text: str) -> Decimal | None:
    """`$1,234.50` -> 1234.50; None unless the text is exactly one number."""
    try:
        value = Decimal(text.strip().rstrip(".").replace(",", "").replace("$", "").strip())
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def number_after_marker(text: str) -> Decimal | None:
    """The number after the last `####`, or None."""
    if "####" not in text:
        return None
    match = NUMBER.match(text.rsplit("####", 1)[1].strip())
    return parse_number(match[0]) if match else None


def final_number(text: str) -> Decimal | None:
    """The number after `####`, else the last number in `text`.

    None if there is none, if it is part of a question, or if it is an operand (`12 + 7` is not an answer).
    """
    if "####" in text:
        return number_after_marker(text)
    matches = list(NUMBER.finditer(text))
    if not matches:
        return None
    last = matches[-1]
    before, after = text[: last.start()], text[last.end() :]
    subtracted = last[0].startswith("-") and before.rstrip()[-1:].isdigit()
    if subtracted or OPERATOR_BEFORE.search(before) or QUESTION_AFTER.match(after):
        return None
    return parse_number(last[0])


def has_right_number(conversation: Conversation, completion: str) -> bool:
    """Whether the completion's final number equals the reference's."""
    return final_number(final_text(conversation, completion)) == final_number(reference_text(conversation))


def has_right_marked_number(conversation: Conversation, completion: str) -> bool:
    """Whether the number after the completion's last `####` equals the reference's; False without a marker."""
    reference = number_after_marker(reference_text(conversation))
    assert reference is not None, "the reference answer must end in #### and a number"
    return number_after_marker(final_text(conversation, completion)) == reference
