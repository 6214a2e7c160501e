"""Reading documents out of files: parquet, .jsonl and .txt, plain or compressed, always as a stream.

Every reader yields one Document after another and holds no more than one piece of the file. What is wrong
with a person's file is told by its name and the line or row, with what to do about it.
"""

import errno
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from nanochat.common import BadShard, UserError, first_line, warn
from nanochat.data.remote import RemoteFile

KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")

Source = Path | RemoteFile  # a file here, or behind a URL: both have a name, and say in full where they are

KIB, MIB = 1024, 1024 * 1024
LONG_TEXT_BYTES = 16 * KIB  # a .txt longer than this is cut ...
PIECE_BYTES = 8 * KIB  # ... into pieces of about this
LARGEST_PIECE = 64 * MIB  # that is fetched in one
MAX_LINE_BYTES = 256 * MIB  # of a .jsonl: without a limit one line could fill the memory


class Document(NamedTuple):
    """A piece of text that stands on its own, and where it comes from (for figures by source)."""

    text: str
    source: str


def document_hash(text: str) -> int:
    """64 bits of BLAKE2b over the text's UTF-8 bytes.

    The split of own data asks only this number: a document's side does not depend on its file, on its
    neighbours or on a seed. Adding files never moves a document from training to validation, and two copies
    of one text always land on the same side, so that none straddles the split.
    """
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


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
    kind = kind_of(path) or ""
    readers = {".parquet": parquet_documents, ".txt": txt_documents, ".jsonl": jsonl_documents}
    reader = next((reader for name, reader in readers.items() if kind.startswith(name)), None)
    if reader is None:
        raise UserError(f"{path} is no parquet, .jsonl or .txt file")
    empty = True
    for document in reader(path, stem_of(path)):
        empty = False
        yield document
    if empty:
        warn(f"{path} holds no text; skipped")


# ---------------------------------------------------------------------------------------------------
# Parquet


def open_parquet(path: Source) -> pq.ParquetFile:
    """Open by the footer alone; UserError names a file that is damaged, cut short or unreadable.

    Pages are read through a small buffer: without one Arrow holds whole column chunks.
    """
    try:
        if isinstance(path, RemoteFile):  # its end was fetched by itself; Arrow would read a good deal before it, too
            meta = parse_footer(path.footer())
            return pq.ParquetFile(path.open(spans_of_text), metadata=meta, buffer_size=MIB, pre_buffer=False)
        return pq.ParquetFile(path, buffer_size=MIB, pre_buffer=False)
    except (PermissionError, FileNotFoundError) as error:
        raise BadShard(f"cannot read {path}: {first_line(error)}", path) from error
    except UnicodeEncodeError as error:
        raise BadShard(f"{str(path)!r} has a name that is not UTF-8; rename it", path) from error
    except (pa.ArrowException, OSError) as error:
        if is_own_trouble(error):
            raise
        reason = f"is not a complete parquet file ({first_line(error)})"
        raise BadShard(f"{path} {reason}; copy or download it again", path) from error


def parse_footer(footer: bytes) -> pq.FileMetaData:
    """What a parquet file's end says. Arrow's errors for one that is damaged."""
    return pq.read_metadata(io.BytesIO(b"PAR1" + footer))


def spans_of_text(footer: bytes) -> list[tuple[int, int]]:
    """Of each row group, where its text and sources stand in the file, in bytes; nowhere, if that is too much at once.

    `footer` is the file's end. An empty list for a file that cannot be used, which its reader will say.
    """
    try:
        meta = parse_footer(footer)
    except (pa.ArrowException, OSError):
        return []
    spans = []
    for group in map(meta.row_group, range(meta.num_row_groups)):
        columns = [group.column(i) for i in range(group.num_columns)]
        wanted = [column for column in columns if column.path_in_schema in ("text", "source")]
        starts = [min(filter(None, (c.dictionary_page_offset, c.data_page_offset))) for c in wanted]
        end = max((start + c.total_compressed_size for start, c in zip(starts, wanted)), default=0)
        spans.append((min(starts), end) if starts and end - min(starts) <= LARGEST_PIECE else (0, 0))
    return spans


def text_columns(path: Source, file: pq.ParquetFile) -> list[str]:
    """The columns to read: `text`, and `source` where there is one. UserError if there is no text."""
    schema = file.schema_arrow
    if "text" not in schema.names:
        found = ", ".join(schema.names) or "none"
        raise UserError(f"{path} has no column named text (its columns: {found}); rename the one with the text")
    if not is_text(schema.field("text").type):
        raise UserError(f"{path}: the column text holds {schema.field('text').type}; it must hold strings")
    has_source = "source" in schema.names and is_text(schema.field("source").type)
    return ["text", "source"] if has_source else ["text"]


def is_text(kind: pa.DataType) -> bool:
    """True for any of Arrow's string types, dictionary-encoded or not."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def read_row_group(path: Source, index: int, source: str) -> list[Document]:
    """The documents of one row group. The file is opened and closed here, so nothing of it stays held."""
    with open_parquet(path) as file:
        try:
            table = file.read_row_group(index, columns=text_columns(path, file), use_threads=False)
            return list(table_documents(table, source))
        except UnicodeDecodeError as error:
            before = sum(file.metadata.row_group(i).num_rows for i in range(index))
            raise not_utf8(path, table, before) from error
        except (pa.ArrowException, OSError) as error:
            raise damaged(path, error) from error


def parquet_documents(path: Source, source: str) -> Iterator[Document]:
    """All documents of a parquet file, as a stream even within a huge row group."""
    with open_parquet(path) as file:
        rows_before = 0
        try:
            for batch in file.iter_batches(64, columns=text_columns(path, file), use_threads=False):
                yield from table_documents(batch, source)
                rows_before += batch.num_rows
        except UnicodeDecodeError as error:
            raise not_utf8(path, batch, rows_before) from error
        except (pa.ArrowException, OSError) as error:
            raise damaged(path, error) from error


def table_documents(table: pa.Table | pa.RecordBatch, source: str) -> list[Document]:
    """The rows as documents; null and blank texts are left out, a missing source becomes `source`."""
    texts = table.column("text").to_pylist()
    if "source" not in table.schema.names:
        return [Document(text, source) for text in texts if text and not text.isspace()]
    rows = zip(texts, table.column("source").to_pylist())
    return [Document(text, given or source) for text, given in rows if text and not text.isspace()]


OWN_TROUBLE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EIO, errno.EDQUOT}  # of this machine


def is_own_trouble(error: BaseException) -> bool:
    """Whether an error is this machine's rather than a file's: it must not let a good file be left out."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in OWN_TROUBLE


def damaged(path: Source, error: Exception) -> Exception:
    """For a file whose footer could be read and whose pages cannot."""
    if is_own_trouble(error):
        return error
    return BadShard(f"{path} is damaged ({first_line(error)}); copy or download it again", path)


def not_utf8(path: Source, table: pa.Table | pa.RecordBatch, rows_before: int) -> UserError:
    """Arrow does not check strings as it reads them; find the row, counted from 1, that cannot be decoded."""
    for name in table.schema.names:
        for row, value in enumerate(table.column(name), rows_before + 1):
            try:
                value.as_py()
            except UnicodeDecodeError:
                problem = f"{path}, row {row}: the {name} is not valid UTF-8; write the file again as UTF-8"
                return BadShard(problem, path)
    raise AssertionError("some row could not be decoded")


# ---------------------------------------------------------------------------------------------------
# Text


def read_chunks(path: Source) -> Iterator[bytes]:
    """The decompressed bytes of a text file in pieces; UserError names one that is damaged or unreadable."""
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
    return path.open() if isinstance(path, RemoteFile) else open(path, "rb")  # type: ignore[return-value]


def read_zstd(path: Source) -> Iterator[bytes]:
    """Decompress frame after frame. The library's own stream reader takes a cut-off frame for the end."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    with open_bytes(path) as file:
        frame = None
        while data := file.read(4 * KIB):  # small, because a few bytes can unfold into very many
            while data:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
        if frame is not None:
            raise EOFError("the last zstd frame has no end")


def decode(path: Source, line: int, raw: bytes) -> str:
    """Bytes that begin on line `line` (from 1) as text; UserError names the line that is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        fix = "convert the file, for instance with iconv -t UTF-8"
        raise BadShard(f"{path}, line {line}: not valid UTF-8 ({error.reason}); {fix}", path) from error


def read_lines(path: Source) -> Iterator[bytes]:
    """Lines of bytes without their line feeds."""
    pieces: list[bytes] = []  # of the line that has not ended yet
    held = 0
    for chunk in read_chunks(path):
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            yield b"".join([*pieces, line]) if pieces else line
            pieces, held = [], 0
        pieces.append(rest)
        held += len(rest)
        if held > MAX_LINE_BYTES:
            limit = f"a line is longer than {MAX_LINE_BYTES // MIB} MiB"
            raise UserError(f"{path}: {limit}; JSON Lines has one document a line")
    if held:
        yield b"".join(pieces)


def jsonl_documents(path: Source, source: str) -> Iterator[Document]:
    """One JSON object a line, with a string under "text" and perhaps one under "source". Blank lines pass."""
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
    """The "text" of a parsed line; null counts as blank, as it does in parquet."""
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
    """`text`, unless it holds half of a surrogate pair: JSON can spell one, UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f"\\u{ord(text[error.start]):04x} is half of a surrogate pair, not a character"
        raise UserError(f"{path}, line {line}: {problem}; write the line again as UTF-8") from error
    return text


def txt_documents(path: Source, source: str) -> Iterator[Document]:
    """A text file is one document; a long one is cut at paragraph borders into several, as it is read."""
    buffer, line = b"", 1
    for chunk in read_chunks(path):
        buffer = (buffer + chunk).replace(b"\r\n", b"\n")
        while len(buffer) > LONG_TEXT_BYTES:
            at = cut_position(buffer)
            yield from txt_piece(path, line, buffer[:at], source)
            line += buffer.count(b"\n", 0, at)
            buffer = buffer[at:]
    yield from txt_piece(path, line, buffer, source)


def cut_position(buffer: bytes) -> int:
    """Where to end a piece: after the last blank line in reach, else line, else space, else any character."""
    low, high = PIECE_BYTES // 2, PIECE_BYTES * 3 // 2
    for border in (b"\n\n", b"\n", b" "):
        at = buffer.rfind(border, low, high)
        if at >= 0:
            return at + len(border)
    at = PIECE_BYTES
    while buffer[at] & 0xC0 == 0x80 and at > PIECE_BYTES - 4:  # not inside a UTF-8 character
        at -= 1
    return at


def txt_piece(path: Source, line: int, raw: bytes, source: str) -> Iterator[Document]:
    """One piece as a document, unless it is blank."""
    text = decode(path, line, raw).removeprefix("\ufeff" if line == 1 else "").strip("\n")
    if text and not text.isspace():
        yield Document(text, source)
