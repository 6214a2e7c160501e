"""Conversations from files of rows; what is none is set aside with its place and the reason."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from nanochat.common import BadShard
from nanochat.common.output import ProgressLine
from nanochat.conversation import Conversation
from nanochat.data.chat_formats import is_message, to_conversation
from nanochat.data.listing import FileListing, exists, kind_among, list_data
from nanochat.data.remote import Source
from nanochat.data.rows import JSON_KINDS, ROW_KINDS, Row, file_rows, json_lines, parse_line
from nanochat.data.text_stream import text_chunks

MAX_REASON_CHARS = 300


@dataclass
class ChatFiles:
    """The conversations of one entry of --data, as JSON: parsed, they would take several times the memory."""

    listing: FileListing
    lines: list[bytes] = field(default_factory=list)
    places: list[str] = field(default_factory=list)  # of each, such as "chats/mine.jsonl, line 3"
    bad: list[str] = field(default_factory=list)  # place and reason of each row that is no conversation

    def add(self, place: str, row: Row) -> None:
        """The row's conversation, or why it is none."""
        try:
            if row.error:
                raise ValueError(row.error)
            self.lines.append(as_line(to_conversation(row.value)))
            self.places.append(place)
        except (ValueError, RecursionError) as error:
            self.bad.append(f"{place}: {' '.join(str(error).split())[:MAX_REASON_CHARS]}")


def read_chats(entry: str, base_dir: Path, known_names: Sequence[str] = ()) -> ChatFiles:
    """Read all conversations of a file, folder, glob or URL. UserError if there is no file.

    A single file of another name is read as JSON Lines. Of a damaged file, what can be read is kept. `known_names` are
    listed where there is no file.
    """
    if exists(entry) and (lone := Path(entry).expanduser()).is_file() and not kind_among(ROW_KINDS, lone):
        chats = ChatFiles(FileListing([lone], Counter({"JSON Lines": 1})))
    else:
        chats = ChatFiles(list_data(entry, ROW_KINDS, base_dir, known_names=known_names))
    progress = ProgressLine(lambda: f"read {len(chats.lines):,} conversations of {entry}")
    for path in chats.listing.files:
        try:
            for row in chat_rows(path):
                chats.add(f"{path}, {row.where}", row)
                progress.show()
        except BadShard as error:
            chats.bad.append(f"{error}; what follows in it is left out")
    progress.close()
    return chats


def as_line(conversation: Conversation) -> bytes:
    """The conversation as JSON, the same for the same content. Raises ValueError if it cannot be written as UTF-8."""
    try:
        return json.dumps(conversation, ensure_ascii=False, sort_keys=True, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{found} is half of a surrogate pair, not a character") from None


def chat_rows(path: Source) -> Iterator[Row]:
    """The rows of a file. A .json file that is one list of messages is one row."""
    kind = kind_among(ROW_KINDS, path)
    if not kind or (kind in JSON_KINDS and has_json_lines(path)):
        yield from json_lines(path)
        return
    rows = file_rows(path)
    first = next(rows, None)
    if first and kind in JSON_KINDS and is_message(first.value):
        found = [first, *rows]
        error = next((row.error for row in found if row.error), "")
        yield Row("its only conversation", [row.value for row in found], error)
    elif first:
        yield from chain([first], rows)


def has_json_lines(path: Source) -> bool:
    """Whether the first of several lines is a whole JSON value, whatever the file's name."""
    line, _, rest = next(text_chunks(path), b"").partition(b"\n")
    return bool(rest.strip()) and not parse_line(path, 1, line).error
