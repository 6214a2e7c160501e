"""The starter conversations in the package, and a test of whether the model knows its name."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nanochat.common import UserError
from nanochat.conversation import Conversation, plain_text
from tasks.answers import final_text
from tasks.common import Task, check_split
from tasks.hub import starter_file

NAME = "nanochat"


class StarterChat(Task):
    """Starter conversations of one split ("train" or "val"), of all sources or of one (smalltalk, qa, identity)."""

    def __init__(self, split: str, source: str | None = None, *, data_dir: Path | str | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.split, self.source = split, source
        table = read_starter(split, data_dir)
        self.conversations = table["messages"]
        if source is not None:
            mask = pc.equal(table["source"], source)
            if not pc.any(mask).as_py():
                sources = ", ".join(sorted(table["source"].unique().to_pylist()))
                raise UserError(f"the starter conversations have no source {source!r}; available: {sources}")
            self.conversations = self.conversations.filter(mask)

    @property
    def name(self) -> str:
        return f"StarterChat/{self.source}" if self.source else "StarterChat"

    def num_examples(self) -> int:
        return len(self.conversations)

    def get_example(self, index: int) -> Conversation:
        return {"messages": self.conversations[index].as_py()}


class Identity(Task):
    """Questions about the model's identity that are not in the training data; right if the answer names nanochat."""

    def __init__(self, split: str = "val", *, data_dir: Path | str | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.split = split
        seen: set[str] = set()  # normalized questions
        if split != "train":
            train = StarterChat("train", data_dir=data_dir)
            seen |= {normalize(m["content"]) for c in train for m in c["messages"] if m["role"] == "user"}
        self.items = []
        for conversation in StarterChat(split, "identity", data_dir=data_dir):
            item = first_exchange(conversation)
            question, answer = (plain_text(message["content"]) for message in item["messages"][-2:])
            # An answer without the name cannot be checked; a question with the name could be answered by echoing it.
            if NAME in answer.lower() and NAME not in question.lower() and normalize(question) not in seen:
                seen.add(normalize(question))
                self.items.append(item)
        if not self.items:
            raise UserError(f"no identity question of split {split!r} is usable and unseen; rebuild the starter data")

    def num_examples(self) -> int:
        return len(self.items)

    def get_example(self, index: int) -> Conversation:
        return self.items[index]

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the answer contains the name, in upper or lower case."""
        return NAME in final_text(conversation, completion).lower()


def read_starter(split: str, data_dir: Path | str | None = None) -> pa.Table:
    """Columns `messages` (list of role, content) and `source` of sft_{split}.parquet."""
    check_split("the starter conversations", split, ("train", "val"))
    path = starter_file(f"sft_{split}.parquet", data_dir)
    try:
        return pq.read_table(path, columns=["messages", "source"])
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as starter conversations ({error})") from error


def first_exchange(conversation: Conversation) -> Conversation:
    """The conversation up to its first answer."""
    messages = conversation["messages"]
    end = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return {"messages": messages[: end + 1]}


def normalize(question: str | list[dict[str, str]]) -> str:
    """Letters and digits only, lower case: `Who are you?` and `who are you` are the same question."""
    return " ".join("".join(c if c.isalnum() else " " for c in plain_text(question).casefold()).split())
