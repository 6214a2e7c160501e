"""Read documents out of parquet files, one row group at a time; errors name the file and the row, and say the fix."""

import errno
import io
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import BadShard, UserError, first_line
from nanochat.data.corpus import Document
from nanochat.data.remote import RemoteFile, Source

READ_BUFFER_BYTES = 2**20
MAX_RANGE_BYTES = 64 * 2**20  # of a row group that is fetched from a URL at once
STREAM_ROWS = 64  # per batch, when a file is read as a stream


def open_parquet(path: Source) -> pq.ParquetFile:
    """Open by the footer alone; BadShard names a file that is damaged, cut short or unreadable.

    Pages are read through a small buffer; without one Arrow holds whole column chunks.
    """
    try:
        if isinstance(path, RemoteFile):  # its footer was fetched already; Arrow would fetch more
            meta = parse_footer(path.footer())
            return pq.ParquetFile(
                path.open(text_ranges), metadata=meta, buffer_size=READ_BUFFER_BYTES, pre_buffer=False
            )
        return pq.ParquetFile(path, buffer_size=READ_BUFFER_BYTES, pre_buffer=False)
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
    return list(parquet_documents(path, source, index))


def parquet_documents(path: Source, source: str, row_group: int | None = None) -> Iterator[Document]:
    """All documents of a parquet file, or of one row group, streamed even within a huge row group."""
    with open_parquet(path) as file:
        groups = range(file.num_row_groups) if row_group is None else [row_group]
        rows_before = sum(file.metadata.row_group(i).num_rows for i in range(row_group or 0))
        try:
            for batch in file.iter_batches(STREAM_ROWS, groups, text_columns(path, file), use_threads=False):
                yield from table_documents(batch, source)
                rows_before += batch.num_rows
        except UnicodeDecodeError as error:
            raise not_utf8(path, batch, rows_before) from error
        except (pa.ArrowException, OSError) as error:
            if is_machine_error(error):
                raise
            raise BadShard(f"{path} is damaged ({first_line(error)}); copy or download it again", path) from error


def table_documents(table: pa.RecordBatch, source: str) -> list[Document]:
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


def not_utf8(path: Source, table: pa.RecordBatch, rows_before: int) -> UserError:
    """The error that names the row, counted from 1, that is not UTF-8: Arrow does not check strings as it reads."""
    for name in table.schema.names:
        for row, value in enumerate(table.column(name), rows_before + 1):
            try:
                value.as_py()
            except UnicodeDecodeError:
                problem = f"{path}, row {row}: the {name} is not valid UTF-8; write the file again as UTF-8"
                return BadShard(problem, path)
    raise AssertionError("some row could not be decoded")
