"""Parse files into documents: parquet, .jsonl and .txt, plain or compressed, as a stream.

Every reader yields one Document after another and holds a bounded part of the file. Errors name the file, the line or
row, and the fix.
"""

import errno
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from nanochat.common import BadShard, UserError, first_line, warn
from nanochat.data.corpus import Document
from nanochat.data.remote import RemoteFile

KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")

Source = Path | RemoteFile  # a file on disk or behind a URL; both have a name, and str() gives the full address

KIB, MIB = 1024, 1024 * 1024
TEXT_BYTES = 8 * KIB  # of a document cut from a .txt, about
MAX_TEXT_BYTES = 16 * KIB  # a longer .txt is cut into several documents
MAX_RANGE_BYTES = 64 * MIB  # of a row group that is fetched from a URL at once
MAX_LINE_BYTES = 256 * MIB  # of a .jsonl: without a limit one line could fill the memory
VAL_LIMIT = 2**64 // 100  # own data: a document whose hash is below it is for validation, one in a hundred


def document_hash(text: str) -> int:
    """64 bits of BLAKE2b over the text's UTF-8 bytes.

    Own data is split by this number alone, so a document's split depends on no file, neighbour or seed. Adding files
    never moves a document from training to validation, and two copies of one text are in the same split.
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
    """Open by the footer alone; BadShard names a file that is damaged, cut short or unreadable.

    Pages are read through a small buffer; without one Arrow holds whole column chunks.
    """
    try:
        if isinstance(path, RemoteFile):  # its footer was fetched already; Arrow would fetch more
            meta = parse_footer(path.footer())
            return pq.ParquetFile(path.open(text_ranges), metadata=meta, buffer_size=MIB, pre_buffer=False)
        return pq.ParquetFile(path, buffer_size=MIB, pre_buffer=False)
    except (PermissionError, FileNotFoundError) as error:
        raise BadShard(f"cannot read {path}: {first_line(error)}", path) from error
    except UnicodeEncodeError as error:
        raise BadShard(f"{str(path)!r} has a name that is not UTF-8; rename it", path) from error
    except (pa.ArrowException, OSError) as error:
        if is_machine_error(error):
            raise
        reason = f"is not a complete parquet file ({first_line(error)})"
        raise BadShard(f"{path} {reason}; copy or download it again", path) from error


def parse_footer(footer: bytes) -> pq.FileMetaData:
    """A parquet file's metadata from its last bytes. Raises Arrow's errors if they are damaged."""
    return pq.read_metadata(io.BytesIO(b"PAR1" + footer))


def text_ranges(footer: bytes) -> list[tuple[int, int]]:
    """The byte range of each row group's text and sources; (0, 0) for one above MAX_RANGE_BYTES.

    `footer` is the file's last bytes. Empty for a damaged file, for which open_parquet raises.
    """
    try:
        meta = parse_footer(footer)
    except (pa.ArrowException, OSError):
        return []
    ranges = []
    for group in map(meta.row_group, range(meta.num_row_groups)):
        columns = [group.column(i) for i in range(group.num_columns)]
        wanted = [column for column in columns if column.path_in_schema in ("text", "source")]
        starts = [min(filter(None, (c.dictionary_page_offset, c.data_page_offset))) for c in wanted]
        end = max((start + c.total_compressed_size for start, c in zip(starts, wanted)), default=0)
        ranges.append((min(starts), end) if starts and end - min(starts) <= MAX_RANGE_BYTES else (0, 0))
    return ranges


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
    """All documents of a parquet file, streamed even within a huge row group."""
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
    """The rows as documents; null and blank texts are dropped, a missing source becomes `source`."""
    texts = table.column("text").to_pylist()
    if "source" not in table.schema.names:
        return [Document(text, source) for text in texts if text and not text.isspace()]
    rows = zip(texts, table.column("source").to_pylist())
    return [Document(text, given or source) for text, given in rows if text and not text.isspace()]


MACHINE_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EIO, errno.EDQUOT}


def is_machine_error(error: BaseException) -> bool:
    """True if an error is this machine's rather than a file's: a good file must not be skipped for it."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in MACHINE_ERRORS


def damaged(path: Source, error: Exception) -> Exception:
    """The error to raise for a file whose footer could be read but not its pages."""
    if is_machine_error(error):
        return error
    return BadShard(f"{path} is damaged ({first_line(error)}); copy or download it again", path)


def not_utf8(path: Source, table: pa.Table | pa.RecordBatch, rows_before: int) -> UserError:
    """The error that names the row, counted from 1, that is not UTF-8: Arrow does not check strings as it reads."""
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
