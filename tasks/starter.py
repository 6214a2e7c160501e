"""The conversations that come with the repository, and the test of whether the model knows its name."""

from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nanochat.common import UserError
from tasks.answers import Conversation, final_text, text_of
from tasks.common import Task
from tasks.hub import DatasetMissing

NAME = "nanochat"


class StarterChat(Task):
    """Starter conversations of one split ("train" or "val"), of one source or of all.

    Sources: smalltalk, qa, identity (whatever the file's `source` column holds).
    """

    def __init__(self, split: str, source: str | None = None, *, data_dir: Path | str | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.split, self.source = split, source
        table = read_starter(split, data_dir)
        self.conversations = table["messages"]
        if source is not None:
            mask = pc.equal(table["source"], source)
            if not pc.any(mask).as_py():
                there = ", ".join(sorted(table["source"].unique().to_pylist()))
                raise UserError(f"the starter conversations have no source {source!r}; there: {there}")
            self.conversations = self.conversations.filter(mask)

    @property
    def name(self) -> str:
        return f"StarterChat/{self.source}" if self.source else "StarterChat"

    def num_examples(self) -> int:
        return len(self.conversations)

    def get_example(self, index: int) -> Conversation:
        return {"messages": self.conversations[index].as_py()}


class Identity(Task):
    """Who-are-you questions that training has not seen; right if the answer names nanochat."""

    def __init__(self, split: str = "val", *, data_dir: Path | str | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.split = split
        items = [first_exchange(c) for c in StarterChat(split, "identity", data_dir=data_dir)]
        seen: set[str] = set()
        if split != "train":
            seen.update(normal(question) for c in StarterChat("train", data_dir=data_dir) for question in questions(c))
        self.items = []
        for item in items:
            question, answer = question_of(item), text_of(item["messages"][-1]["content"])
            # A question that says the name can be answered by echoing; one whose answer does not, not judged.
            if NAME in answer.lower() and NAME not in question.lower() and normal(question) not in seen:
                seen.add(normal(question))
                self.items.append(item)
        if not self.items:
            raise UserError(f"no identity question of split {split!r} is usable and unseen; rebuild the starter data")

    def num_examples(self) -> int:
        return len(self.items)

    def get_example(self, index: int) -> Conversation:
        return self.items[index]

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """The answer holds the name, in any case."""
        return NAME in final_text(conversation, completion).lower()


def read_starter(split: str, data_dir: Path | str | None = None) -> pa.Table:
    """Columns `messages` (list of role, content) and `source` of sft_{split}.parquet."""
    if split not in ("train", "val"):
        raise UserError(f"the starter conversations have the splits train and val, not {split!r}")
    folder = resources.files("nanochat").joinpath("starter") if data_dir is None else Path(data_dir)
    path = Path(str(folder)) / f"sft_{split}.parquet"
    if not path.exists():
        raise DatasetMissing(f"{path} is missing; rebuild it with `python dev/build_starter_data.py`")
    try:
        return pq.read_table(path, columns=["messages", "source"])
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as starter conversations ({error})") from error


def first_exchange(conversation: Conversation) -> Conversation:
    """The conversation up to its first answer."""
    messages = conversation["messages"]
    end = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return {"messages": messages[: end + 1]}


def questions(conversation: Conversation) -> list[str]:
    return [text_of(message["content"]) for message in conversation["messages"] if message["role"] == "user"]


def question_of(conversation: Conversation) -> str:
    return text_of(conversation["messages"][-2]["content"])


def normal(question: str) -> str:
    """Letters and digits only, lower case: `Who are you?` and `who are you` are one question."""
    return " ".join("".join(c if c.isalnum() else " " for c in question.casefold()).split())
