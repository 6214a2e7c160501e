"""Conversations from files of rows; what is none is set aside with its place and the reason."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat.data.chat_formats import is_message, to_conversation
from nanochat.data.listing import FileListing, kind_among, list_data
from nanochat.data.remote import Source
from nanochat.data.rows import JSON_KINDS, ROW_KINDS, Row, file_rows, json_lines


@dataclass
class ChatFiles:
    """The conversations of one entry of --data, as JSON: parsed, they would take several times the memory."""

    listing: FileListing
    lines: list[bytes] = field(default_factory=list)
    places: list[str] = field(default_factory=list)  # of each, such as "chats/mine.jsonl, line 3"
    bad: list[str] = field(default_factory=list)  # place and reason of each row that is no conversation


def read_chats(entry: str, base_dir: Path, known_names: Sequence[str] = ()) -> ChatFiles:
    """Read all conversations of a file, folder, glob or URL. UserError if there is no file; BadShard if one is damaged.

    A single file of another name is read as JSON Lines. `known_names` are listed where there is no file.
    """
    lone = Path(entry).expanduser()
    if lone.is_file() and not kind_among(ROW_KINDS, lone):
        chats = ChatFiles(FileListing([lone]))
    else:
        chats = ChatFiles(list_data(entry, ROW_KINDS, base_dir, known_names=known_names))
    for path in chats.listing.files:
        for row in chat_rows(path):
            place = f"{path}, {row.where}"
            try:
                if row.error:
                    raise ValueError(row.error)
                conversation = to_conversation(row.value)
                chats.lines.append(json.dumps(conversation, ensure_ascii=False, sort_keys=True).encode("utf-8"))
                chats.places.append(place)
            except ValueError as error:
                chats.bad.append(f"{place}: {error}")
    return chats


def chat_rows(path: Source) -> Iterator[Row]:
    """The rows of a file. A .json file that is one list of messages is one row."""
    kind = kind_among(ROW_KINDS, path)
    rows = file_rows(path) if kind else json_lines(path)
    first = next(rows, None)
    if first is None:
        return
    if kind in JSON_KINDS and first.where.startswith("item") and is_message(first.value):
        messages: list[Any] = [first.value]
        for row in rows:
            messages.append(row.value)
            if row.error:
                yield row
                return
        yield Row("its only conversation", messages)
        return
    yield first
    yield from rows
