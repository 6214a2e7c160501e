"""Your own conversations: files of JSON Lines, JSON, CSV or parquet, in any of the usual formats."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat.common import UserError, get_base_dir
from nanochat.conversation import Conversation
from nanochat.data.chat_files import read_chats
from nanochat.data.corpus import document_hash
from tasks.common import Task, TaskSubset

NAMED = ("starter", "published")  # entries of chat_sft's --data that are no path
VAL_SHARE = 50  # one conversation in so many is held out
VAL_LIMIT = 2**64 // VAL_SHARE


class CustomJSON(Task):
    """The conversations of a file, a folder, a glob or a URL (docs/own_data.md).

    Rows that are no conversation are left out, and named in `bad`; with `strict` they are a UserError.
    """

    def __init__(self, path: Path | str, *, strict: bool = True, **kwargs: Any):
        super().__init__(**kwargs)
        self.path = str(path)
        self.chats = read_chats(self.path, get_base_dir(), NAMED)
        self.bad, self.listing = self.chats.bad, self.chats.listing.describe()
        if strict and self.bad:
            more = f" (and {len(self.bad) - 1} more)" if len(self.bad) > 1 else ""
            raise UserError(self.bad[0] + more)
        if not self.chats.lines and not self.bad:
            raise UserError(f"{self.path} holds no conversations; write one JSON array of messages per line")

    @property
    def name(self) -> str:
        return f"CustomJSON/{Path(self.path).name}"

    def num_examples(self) -> int:
        return len(self.chats.lines)

    def get_example(self, index: int) -> Conversation:
        return json.loads(self.chats.lines[index])

    def place(self, index: int) -> str:
        return self.chats.places[self.indices()[index]]

    def split(self, usable: Callable[[Conversation], bool]) -> tuple[TaskSubset, TaskSubset]:
        """(training part, validation part): one conversation in fifty is held out, chosen by a hash of its content.

        Both get a `usable` conversation if there are two: where chance gives one of them none, the usable one with the
        smallest hash is held out, with its copies.
        """
        hashes = [document_hash(line.decode("utf-8")) for line in self.chats.lines]
        order = sorted(range(len(hashes)), key=lambda i: (hashes[i], i))
        held = {i for i in order if hashes[i] < VAL_LIMIT}
        sides = [[i for i in order if i in held], [i for i in order if i not in held]]
        if not all(any(usable(self[i]) for i in side) for side in sides):
            chosen = next((i for i in order if usable(self[i])), order[0])
            copies = {i for i in order if hashes[i] == hashes[chosen]}
            held = copies if any(usable(self[i]) for i in order if i not in copies) else {chosen}
        return self._parts(held)

    def split_tail(self) -> tuple[TaskSubset, TaskSubset]:
        """(training part, validation part) of runs before the split by content: the last fiftieth is held out."""
        return self._parts(set(range(len(self) - max(1, len(self) // VAL_SHARE), len(self))))

    def _parts(self, held: set[int]) -> tuple[TaskSubset, TaskSubset]:
        return TaskSubset(self, [i for i in range(len(self)) if i not in held]), TaskSubset(self, sorted(held))
