"""Read files of rows: JSON Lines, JSON, CSV and parquet. A row is an object with named fields, or any JSON value.

Used for documents (textfiles.py) and for conversations. A row that cannot be parsed is yielded with its error, so that
the caller may go on with the next one.
"""

import codecs
import csv
import json
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

from nanochat.common import BadShard, UserError, first_line
from nanochat.data.listing import kind_among, with_compressions
from nanochat.data.parquet import parquet_rows
from nanochat.data.remote import Source
from nanochat.data.text_stream import MAX_LINE_BYTES, decode, not_utf8, read_lines, text_chunks

LINE_KINDS, JSON_KINDS = with_compressions(".jsonl", ".ndjson"), with_compressions(".json")
CSV_KINDS = with_compressions(".csv", ".tsv")
ROW_KINDS = (".parquet", *LINE_KINDS, *JSON_KINDS, *CSV_KINDS)

DECODER = json.JSONDecoder()
LONGEST_ATOM = 16  # characters of a number, a literal or an escape that a chunk's end may cut


class Row(NamedTuple):
    """One row of a file. `where` names its place for messages: `line 3`, `item 3` or `row 3`, counted from 1."""

    where: str
    value: Any
    error: str = ""  # why the row could not be parsed


def file_rows(path: Source) -> Iterator[Row]:
    """The rows of a file of ROW_KINDS, in order; blank lines are left out. BadShard if it cannot be read on."""
    kind = kind_among(ROW_KINDS, path) or ""
    if kind == ".parquet":
        return (Row(f"row {number}", value) for number, value in enumerate(parquet_rows(path), 1))
    if kind in CSV_KINDS:
        return csv_rows(path)
    return json_rows(path) if kind in JSON_KINDS else json_lines(path)


def json_lines(path: Source) -> Iterator[Row]:
    """One JSON value per line."""
    for number, raw in enumerate(read_lines(path), 1):
        if raw and not raw.isspace():
            yield parse_line(path, number, raw)


def parse_line(path: Source, number: int, raw: bytes) -> Row:
    """The value on a line, or why there is none."""
    where = f"line {number}"
    try:
        return Row(where, json.loads(raw.decode("utf-8").removeprefix("\ufeff")))
    except UnicodeDecodeError:
        return Row(where, None, not_utf8(path, raw))
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
        return Row(where, None, f"not JSON ({reason}); each line must be one whole object")


def json_rows(path: Source) -> Iterator[Row]:
    """The items of an array, or values one after another (a single object, or JSON Lines by another name).

    Holds one item and one chunk at a time. What follows a syntax error cannot be made out: it ends the file.
    """
    chunks = decoded_chunks(path)
    text, at, number, in_array = "", 0, 1, False
    while True:
        while at < len(text) and text[at] in " \t\n":
            at += 1
        if at == len(text):
            text, at = next(chunks, ""), 0
            if not text:
                break
        elif text[at] == "[" and not in_array:
            in_array, at = True, at + 1
        elif text[at] in ",]" and in_array:
            in_array, at = text[at] == ",", at + 1
        else:
            try:
                value, at = DECODER.raw_decode(text, at)
            except (json.JSONDecodeError, RecursionError) as error:
                more = read_more(chunks, len(text) - at) if is_incomplete(error, text) else ""
                if not more:
                    yield Row(f"item {number}", None, f"not JSON ({getattr(error, 'msg', 'nested too deeply')})")
                    return
                text, at = text[at:] + more, 0
                continue
            yield Row(f"item {number}", value)
            number += 1
    if in_array:
        yield Row(f"item {number}", None, "the array has no end; the file may be cut short")


def decoded_chunks(path: Source) -> Iterator[str]:
    """The file's text in chunks, none of them empty; BadShard if it is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    for chunk in text_chunks(path):
        try:
            text = decoder.decode(chunk)
        except UnicodeDecodeError as error:
            decode(path, line, chunk)  # raises with the fix
            raise BadShard(f"{path}, line {line}: not valid UTF-8", path) from error
        line += text.count("\n")
        if text:
            yield text
    if decoder.getstate()[0]:
        raise BadShard(f"{path} ends within a UTF-8 character; copy or download it again", path)


def read_more(chunks: Iterator[str], length: int) -> str:
    """At least `length` further characters, fewer at the file's end; none for an item that is too long."""
    more = ""
    while length <= MAX_LINE_BYTES and len(more) <= length and (chunk := next(chunks, "")):
        more += chunk
    return more


def is_incomplete(error: Exception, text: str) -> bool:
    """Whether parsing failed only because `text` ends too early."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - LONGEST_ATOM


def csv_rows(path: Source) -> Iterator[Row]:
    """The rows below a header, as objects. Separated by commas, semicolons or tabs, whichever the header has most of.

    UserError for two columns of one name.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = (decode(path, number, raw) + "\n" for number, raw in enumerate(read_lines(path), 1))
    header = next(lines, "")
    reader = csv.reader(chain([header], lines), delimiter=max(",;\t", key=header.count), strict=True)
    names = next(reader, [])
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path} has two columns named {twice[0] or 'nothing'}; rename one of them")
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(f"line {reader.line_num}", None, f"not CSV ({error})")
            continue
        problem = f"it has {len(values)} fields, the header {len(names)}; fields that hold separators need quotes"
        if values:
            yield Row(f"line {reader.line_num}", dict(zip(names, values)), problem * (len(values) != len(names)))
