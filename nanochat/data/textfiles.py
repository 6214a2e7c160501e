"""Parse files into documents: text, JSON, CSV and parquet, plain or compressed, as a stream.

Every reader yields one Document after another and holds a bounded part of the file. Errors name the file, the line or
row, and the fix.
"""

from collections.abc import Iterator
from functools import partial

from nanochat.common import BadShard, UserError
from nanochat.data.corpus import Document
from nanochat.data.listing import kind_among, with_compressions
from nanochat.data.parquet import CLEANED, TextOptions, parquet_documents
from nanochat.data.remote import Source
from nanochat.data.rows import ROW_KINDS, Row, file_rows
from nanochat.data.text_stream import KIB, clean, decode, text_chunks

TEXT_KINDS = with_compressions(".txt", ".md")
KINDS = (*TEXT_KINDS, *ROW_KINDS)

TEXT_BYTES = 8 * KIB  # of a document cut from a .txt, about
MAX_TEXT_BYTES = 16 * KIB  # a longer .txt is cut into several documents


kind_of = partial(kind_among, KINDS)  # the entry of KINDS that a file's name ends in, or None


def stem_of(path: Source) -> str:
    """The file's name without its kind: `tales.jsonl.zst` -> `tales`."""
    name = path.name.encode(errors="replace").decode()  # on Linux a name may be any bytes, a source is text
    return name[: len(name) - len(kind_of(path) or "")] or name


class NoTextField(UserError):
    """The first row of a file has no field with the text: it may be something else than data, such as settings."""


def file_documents(path: Source, options: TextOptions = CLEANED) -> Iterator[Document]:
    """All documents of a file of any accepted kind, in order."""
    kind = kind_of(path)
    if kind == ".parquet":
        return parquet_documents(path, stem_of(path), options)
    if kind in TEXT_KINDS:
        return txt_documents(path, stem_of(path))
    return row_documents(path, stem_of(path), options)


def row_documents(path: Source, source: str, options: TextOptions = CLEANED) -> Iterator[Document]:
    """The text of each row of a JSON or CSV file; under "source" the row may name another source."""
    for index, row in enumerate(file_rows(path)):
        if row.error:
            raise BadShard(f"{path}, {row.where}: {row.error}", path)
        try:
            text = text_of_row(path, row, options)
        except NoTextField as error:
            if index == 0:
                raise
            raise UserError(str(error)) from error
        if text and not text.isspace():
            given = row.value.get("source") if options.field != "source" else None
            yield Document(text, encodable(path, row, given) if isinstance(given, str) and given else source)


def text_of_row(path: Source, row: Row, options: TextOptions) -> str:
    """The text of a parsed row; null counts as blank, as in parquet. NoTextField if the row has no such field."""
    where, value, field = f"{path}, {row.where}", row.value, options.field
    if not isinstance(value, dict):
        raise UserError(f'{where}: expected an object like {{"{field}": "..."}}, found a {type(value).__name__}')
    if field not in value:
        hint = "conversations are for chat_sft --data" if "messages" in value else "name the one with --text-field=NAME"
        raise NoTextField(f'{where}: no "{field}" (its fields: {", ".join(value) or "none"}); {hint}')
    text = "" if value[field] is None else value[field]
    if not isinstance(text, str):
        raise UserError(f'{where}: "{field}" must be a string, found {type(text).__name__}')
    return encodable(path, row, clean(text, path) if options.clean else text)


def encodable(path: Source, row: Row, text: str) -> str:
    """`text`; raises UserError if it holds half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f"\\u{ord(text[error.start]):04x} is half of a surrogate pair, not a character"
        raise UserError(f"{path}, {row.where}: {problem}; write it again as UTF-8") from error
    return text


def txt_documents(path: Source, source: str) -> Iterator[Document]:
    """A text file as one document; a long one is cut at paragraph borders into several, as it is read."""
    buffer, line = b"", 1
    for chunk in text_chunks(path):
        buffer += chunk
        while len(buffer) > MAX_TEXT_BYTES:
            at = cut_position(buffer)
            yield from txt_document(path, line, buffer[:at], source)
            line += buffer.count(b"\n", 0, at)
            buffer = buffer[at:]
    yield from txt_document(path, line, buffer, source)


def cut_position(buffer: bytes) -> int:
    """Where to end a document: after the last blank line within reach, else line, else space, else any character."""
    low, high = TEXT_BYTES // 2, TEXT_BYTES * 3 // 2
    for border in (b"\n\n", b"\n", b" "):
        at = buffer.rfind(border, low, high)
        if at >= 0:
            return at + len(border)
    at = TEXT_BYTES
    while buffer[at] & 0xC0 == 0x80 and at > TEXT_BYTES - 4:  # not inside a UTF-8 character
        at -= 1
    return at


def txt_document(path: Source, line: int, raw: bytes, source: str) -> Iterator[Document]:
    """The bytes as a document, unless they are blank."""
    text = decode(path, line, raw).strip("\n")
    if text and not text.isspace():
        yield Document(text, source)
