"""Read documents out of parquet files, one row group at a time; errors name the file and the row, and say the fix."""

import errno
import io
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import BadShard, UserError, first_line
from nanochat.data.corpus import Document
from nanochat.data.remote import RangesOf, RemoteFile, Source
from nanochat.data.text_stream import clean

READ_BUFFER_BYTES = 2**20
MAX_RANGE_BYTES = 64 * 2**20  # of a row group that is fetched from a URL at once
CONVERTED = "converted"  # folder of the base folder: parquet files made from text of other formats
STREAM_ROWS = 64  # per batch, when a file is read as a stream


class TextOptions(NamedTuple):
    """How documents are read out of rows."""

    field: str = "text"  # the column with the text
    clean: bool = True  # line ends, NUL and BOM as in text_stream; runs that began without it keep their documents


CLEANED, UNCHANGED = TextOptions(), TextOptions(clean=False)


def open_parquet(path: Source, field: str = "text") -> pq.ParquetFile:
    """Open by the footer alone; BadShard names a file that is damaged, cut short or unreadable.

    Of a file behind a URL, the column `field` of a row group is fetched at once. Pages are read through a small buffer;
    without one Arrow holds whole column chunks.
    """
    try:
        if isinstance(path, RemoteFile):  # its footer was fetched already; Arrow would fetch more
            meta = parse_footer(path.footer())
            return pq.ParquetFile(
                path.open(text_ranges(field)), metadata=meta, buffer_size=READ_BUFFER_BYTES, pre_buffer=False
            )
        return pq.ParquetFile(path, buffer_size=READ_BUFFER_BYTES, pre_buffer=False)
    except (PermissionError, FileNotFoundError) as error:
        raise BadShard(f"cannot read {path}: {first_line(error)}", path) from error
    except UnicodeEncodeError as error:
        raise BadShard(f"{str(path)!r} has a name that is not UTF-8; rename it", path) from error
    except (pa.ArrowException, OSError) as error:
        if is_machine_error(error):
            raise
        raise damaged(path, f"is not a complete parquet file ({first_line(error)})") from error


def damaged(path: Source, problem: str) -> BadShard:
    """The error for a file that Arrow cannot read, with what makes it whole."""
    fix = "copy or download it again"
    if isinstance(path, Path) and path.parent.parent.name == CONVERTED and (path.parent / "manifest.json").is_file():
        fix = f"delete {path.parent}, which is made again from your text"
    return BadShard(f"{path} {problem}; {fix}", path)


def parse_footer(footer: bytes) -> pq.FileMetaData:
    """A parquet file's metadata from its last bytes. Raises Arrow's errors if they are damaged."""
    return pq.read_metadata(io.BytesIO(b"PAR1" + footer))


@lru_cache
def text_ranges(field: str) -> RangesOf:
    """A function from a file's last bytes to the byte range of each row group's text and sources.

    (0, 0) for a range above MAX_RANGE_BYTES; no ranges for a damaged file, for which open_parquet raises.
    """

    def ranges_of(footer: bytes) -> list[tuple[int, int]]:
        try:
            meta = parse_footer(footer)
        except (pa.ArrowException, OSError):
            return []
        return [text_range(meta.row_group(i), field) for i in range(meta.num_row_groups)]

    return ranges_of


def text_range(group: pq.RowGroupMetaData, field: str) -> tuple[int, int]:
    """Start and end in the file of a row group's text and sources; (0, 0) above MAX_RANGE_BYTES."""
    columns = [group.column(i) for i in range(group.num_columns)]
    wanted = [column for column in columns if column.path_in_schema in (field, "source")]
    starts = [min(filter(None, (c.dictionary_page_offset, c.data_page_offset))) for c in wanted]
    end = max((start + c.total_compressed_size for start, c in zip(starts, wanted)), default=0)
    return (min(starts), end) if starts and end - min(starts) <= MAX_RANGE_BYTES else (0, 0)


def text_columns(path: Source, file: pq.ParquetFile, field: str) -> list[str]:
    """The columns to read: the text, and `source` where there is one. UserError if there is no text."""
    schema = file.schema_arrow
    if field not in schema.names:
        found = ", ".join(schema.names) or "none"
        raise UserError(f"{path} has no column named {field} (its columns: {found}); name it with --text-field=NAME")
    columns = [field] if field == "source" or "source" not in schema.names else [field, "source"]
    for name in columns:
        if schema.names.count(name) > 1:
            raise UserError(f"{path} has {schema.names.count(name)} columns named {name}; rename all but one")
    if not is_text(schema.field(field).type):
        raise UserError(f"{path}: the column {field} holds {schema.field(field).type}; it must hold strings")
    return [name for name in columns if is_text(schema.field(name).type)]


def is_text(kind: pa.DataType) -> bool:
    """True for any of Arrow's types of strings or of their UTF-8 bytes, dictionary-encoded or not."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    accepted = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())
    return kind in accepted


def read_row_group(path: Source, index: int, source: str, options: TextOptions = CLEANED) -> list[Document]:
    """The documents of one row group. The file is opened and closed here, so nothing of it stays held."""
    return list(parquet_documents(path, source, options, index))


def parquet_documents(
    path: Source, source: str, options: TextOptions = CLEANED, row_group: int | None = None
) -> Iterator[Document]:
    """All documents of a parquet file, or of one row group, streamed even within a huge row group."""
    with open_parquet(path, options.field) as file:
        groups = range(file.num_row_groups) if row_group is None else [row_group]
        rows_before = sum(file.metadata.row_group(i).num_rows for i in range(row_group or 0))
        try:
            columns = text_columns(path, file, options.field)
            for batch in file.iter_batches(STREAM_ROWS, groups, columns, use_threads=False):
                for text, given in zip(*batch_columns(batch, columns)):
                    text = clean(text, path) if text and options.clean else text
                    if text and not text.isspace():
                        yield Document(text, given or source)
                rows_before += batch.num_rows
        except UnicodeDecodeError as error:
            raise not_utf8(path, batch, rows_before) from error
        except (pa.ArrowException, OSError) as error:
            if is_machine_error(error):
                raise
            raise damaged(path, f"is damaged ({first_line(error)})") from error


def parquet_rows(path: Source) -> Iterator[dict[str, Any]]:
    """All rows of a parquet file with all columns as Python objects, streamed. BadShard if it is damaged."""
    with open_parquet(path) as file:
        try:
            for batch in file.iter_batches(STREAM_ROWS, use_threads=False):
                yield from batch.to_pylist()
        except UnicodeDecodeError as error:
            raise BadShard(
                f"{path}: some text in it is not valid UTF-8; write the file again as UTF-8", path
            ) from error
        except (pa.ArrowException, OSError) as error:
            if is_machine_error(error):
                raise
            raise damaged(path, f"is damaged ({first_line(error)})") from error


def batch_columns(batch: pa.RecordBatch, columns: list[str]) -> list[list[str | None]]:
    """The texts and the sources (None where there are none) of some rows."""
    found = [[as_str(value) for value in batch.column(name).to_pylist()] for name in columns]
    return found if len(found) > 1 else [*found, [None] * batch.num_rows]


def as_str(value: str | bytes | None) -> str | None:
    """A string as it is, UTF-8 bytes decoded."""
    return value.decode("utf-8") if isinstance(value, bytes) else value


MACHINE_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EIO, errno.EDQUOT}


def is_machine_error(error: BaseException) -> bool:
    """True if an error is this machine's rather than a file's: a good file must not be skipped for it."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in MACHINE_ERRORS


def not_utf8(path: Source, table: pa.RecordBatch, rows_before: int) -> UserError:
    """The error that names the row, counted from 1, that is not UTF-8: Arrow does not check strings as it reads."""
    for name in table.schema.names:
        for row, value in enumerate(table.column(name), rows_before + 1):
            try:
                as_str(value.as_py())
            except UnicodeDecodeError:
                problem = f"{path}, row {row}: the {name} is not valid UTF-8; write the file again as UTF-8"
                return BadShard(problem, path)
    raise AssertionError("some row could not be decoded")
