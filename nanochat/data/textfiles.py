"""Parse files into documents: .jsonl and .txt, plain or compressed, and parquet, as a stream.

Every reader yields one Document after another and holds a bounded part of the file. Errors name the file, the line or
row, and the fix.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, BinaryIO

import zstandard

from nanochat.common import BadShard, UserError, first_line, warn
from nanochat.data.corpus import Document
from nanochat.data.parquet import parquet_documents
from nanochat.data.remote import RemoteFile, Source

KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")

KIB, MIB = 1024, 1024 * 1024
TEXT_BYTES = 8 * KIB  # of a document cut from a .txt, about
MAX_TEXT_BYTES = 16 * KIB  # a longer .txt is cut into several documents
MAX_LINE_BYTES = 256 * MIB  # of a .jsonl: without a limit one line could fill the memory


def kind_of(path: Source | PurePath) -> str | None:
    """The entry of KINDS that the file's name ends in, or None."""
    name = path.name.lower()
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def stem_of(path: Source) -> str:
    """The file's name without its kind: `tales.jsonl.zst` -> `tales`."""
    name = path.name.encode(errors="replace").decode()  # on Linux a name may be any bytes, a source is text
    return name[: len(name) - len(kind_of(path) or "")] or name


def file_documents(path: Source) -> Iterator[Document]:
    """All documents of a file of any accepted kind, in order; warns if there is none."""
    readers = {"parquet": parquet_documents, "txt": txt_documents, "jsonl": jsonl_documents}
    _, name, *_ = (kind_of(path) or "").split(".")  # .txt.gz -> txt
    empty = True
    for document in readers[name](path, stem_of(path)):
        empty = False
        yield document
    if empty:
        warn(f"{path} holds no text; skipped")


def read_chunks(path: Source) -> Iterator[bytes]:
    """The decompressed bytes of a text file in chunks; BadShard names one that is damaged or unreadable."""
    kind = kind_of(path) or ""
    try:
        if kind.endswith(".zst"):
            yield from read_zstd(path)
            return
        with open_bytes(path) as raw, gzip.open(raw) if kind.endswith(".gz") else raw as file:
            while chunk := file.read(64 * KIB):
                yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        reason = f"is damaged or cut short ({first_line(error)})"
        raise BadShard(f"{path} {reason}; copy or download it again", path) from error
    except OSError as error:
        raise BadShard(f"cannot read {path}: {error.strerror or error}", path) from error


def open_bytes(path: Source) -> BinaryIO:
    """The file's bytes, to be read from the beginning."""
    return path.open() if isinstance(path, RemoteFile) else open(path, "rb")


def read_zstd(path: Source) -> Iterator[bytes]:
    """Decompress frame after frame. The library's own stream reader takes a truncated frame for the end."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    with open_bytes(path) as file:
        frame = None
        while data := file.read(4 * KIB):  # small, as a few bytes can decompress to very many
            while data:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
        if frame is not None:
            raise EOFError("the last zstd frame has no end")


def decode(path: Source, line: int, raw: bytes) -> str:
    """Decode bytes that begin on line `line` (from 1); BadShard names the line that is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        fix = "convert the file, for instance with iconv -t UTF-8"
        raise BadShard(f"{path}, line {line}: not valid UTF-8 ({error.reason}); {fix}", path) from error


def read_lines(path: Source) -> Iterator[bytes]:
    """Lines of bytes without their line feeds."""
    unfinished: list[bytes] = []  # chunks of the line that has not ended yet
    size = 0
    for chunk in read_chunks(path):
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            yield b"".join([*unfinished, line])
            unfinished, size = [], 0
        unfinished.append(rest)
        size += len(rest)
        if size > MAX_LINE_BYTES:
            limit = f"a line is longer than {MAX_LINE_BYTES // MIB} MiB"
            raise UserError(f"{path}: {limit}; JSON Lines has one document a line")
    if size:
        yield b"".join(unfinished)


def jsonl_documents(path: Source, source: str) -> Iterator[Document]:
    """One JSON object per line, with a string under "text" and perhaps one under "source". Blank lines are ignored."""
    for number, raw in enumerate(read_lines(path), 1):
        line = decode(path, number, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw)
        if not line or line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
            problem = f"{path}, line {number}: not JSON ({reason})"
            raise BadShard(f"{problem}; each line must be one whole object", path) from error
        text = text_field(path, number, row)
        if text and not text.isspace():
            given = row.get("source")
            yield Document(text, encodable(path, number, given) if isinstance(given, str) and given else source)


def text_field(path: Source, number: int, row: Any) -> str:
    """The "text" of a parsed line; null counts as blank, as in parquet."""
    where = f"{path}, line {number}"
    if not isinstance(row, dict):
        raise UserError(f'{where}: expected an object like {{"text": "..."}}, found a {type(row).__name__}')
    if "text" not in row:
        hint = "conversations are for chat_sft --data" if "messages" in row else "rename the one with the text"
        raise UserError(f'{where}: no "text" (its fields: {", ".join(row) or "none"}); {hint}')
    text = "" if row["text"] is None else row["text"]
    if not isinstance(text, str):
        raise UserError(f'{where}: "text" must be a string, found {type(text).__name__}')
    return encodable(path, number, text)


def encodable(path: Source, line: int, text: str) -> str:
    """`text`; raises UserError if it holds half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f"\\u{ord(text[error.start]):04x} is half of a surrogate pair, not a character"
        raise UserError(f"{path}, line {line}: {problem}; write the line again as UTF-8") from error
    return text


def txt_documents(path: Source, source: str) -> Iterator[Document]:
    """A text file as one document; a long one is cut at paragraph borders into several, as it is read."""
    buffer, line = b"", 1
    for chunk in read_chunks(path):
        buffer = (buffer + chunk).replace(b"\r\n", b"\n")
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
    text = decode(path, line, raw).removeprefix("\ufeff" if line == 1 else "").strip("\n")
    if text and not text.isspace():
        yield Document(text, source)
