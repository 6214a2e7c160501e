"""Your own conversations: a text file with one JSON array of messages per line."""

import json
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.conversation import Conversation, validate_conversation
from tasks.common import Task


class CustomJSON(Task):
    """The conversations of a .jsonl file, all validated on construction.

    A line is `[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]`, or an object with
    such an array under "messages". Empty lines are skipped.
    """

    def __init__(self, path: Path | str, **kwargs: Any):
        super().__init__(**kwargs)
        self.path = Path(path)
        self.conversations = read_conversations(self.path)

    @property
    def name(self) -> str:
        return f"CustomJSON/{self.path.name}"

    def num_examples(self) -> int:
        return len(self.conversations)

    def get_example(self, index: int) -> Conversation:
        return self.conversations[index]


def read_conversations(path: Path) -> list[Conversation]:
    """All conversations of the file; raises UserError naming the file, the line and the problem."""
    conversations = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        conversations.append(parse_line(line))
                    except ValueError as error:
                        raise UserError(f"{path}, line {number}: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not conversations:
        raise UserError(f"{path} holds no conversations; write one JSON array of messages per line")
    return conversations


def parse_line(line: bytes) -> Conversation:
    """One conversation; raises ValueError."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    conversation = value if isinstance(value, dict) else {"messages": value}
    validate_conversation(conversation, for_training=True)
    return {"messages": conversation["messages"]}
