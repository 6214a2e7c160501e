"""Read text files as a stream of UTF-8 bytes, plain or compressed, whatever their line ends.

Every kind of text file gets the same treatment here: `\\r\\n` and a lone `\\r` become `\\n`, a byte order mark at the
beginning and NUL characters are removed, and other encodings than UTF-8 are refused with the command that converts
the file.
"""

import codecs
import gzip
import shlex
import zlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from typing import BinaryIO

import zstandard

from nanochat.common import BadShard, UserError, first_line, warn
from nanochat.data.remote import RemoteFile, Source

KIB, MIB = 1024, 1024 * 1024
SAMPLE_BYTES = 64 * KIB  # from which the encoding is guessed
MAX_LINE_BYTES = 256 * MIB  # without a limit one line could fill the memory
WIDE_BOMS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}  # these first: one begins as UTF-16's does
WIDE_BOMS |= {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def read_chunks(path: Source) -> Iterator[bytes]:
    """The file's bytes, decompressed, in chunks; BadShard names a file that is damaged or unreadable."""
    name = path.name.lower()
    try:
        if name.endswith(".zst"):
            yield from read_zstd(path)
            return
        with open_bytes(path) as raw, gzip.open(raw) if name.endswith(".gz") else raw as file:
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


def text_chunks(path: Source) -> Iterator[bytes]:
    """The file's text as UTF-8 bytes in chunks, cleaned as the module says. BadShard for UTF-16 and UTF-32."""
    chunks = read_chunks(path)
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= SAMPLE_BYTES:
            break
    if encoding := wide_encoding(head[:SAMPLE_BYTES]):
        raise BadShard(f"{path} is {encoding}, not UTF-8; {conversion(path, encoding)}", path)
    held = b""  # a \r at a chunk's end: the next may begin with \n
    for chunk in chain([head.removeprefix(codecs.BOM_UTF8)], chunks):
        chunk = held + chunk
        held = b"\r" if chunk.endswith(b"\r") else b""
        chunk = chunk.removesuffix(held).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if b"\0" in chunk:
            warn_of_nul(path)
            chunk = chunk.replace(b"\0", b"")
        yield chunk
    if held:
        yield b"\n"


def clean(text: str, path: Source) -> str:
    """A string out of JSON, CSV or parquet, cleaned as the text of a file is."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        warn_of_nul(path)
        text = text.replace("\0", "")
    return text.removeprefix("\ufeff")


@lru_cache(maxsize=1024)
def warn_of_nul(path: Source) -> None:
    """Warn once about each file."""
    warn(f"{path}: there are NUL characters in its text; they are left out")


def read_lines(path: Source) -> Iterator[bytes]:
    """The file's lines as UTF-8 bytes without their line feeds."""
    unfinished: list[bytes] = []  # chunks of the line that has not ended yet
    size = 0
    for chunk in text_chunks(path):
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            yield b"".join([*unfinished, line])
            unfinished, size = [], 0
        unfinished.append(rest)
        size += len(rest)
        if size > MAX_LINE_BYTES:
            raise UserError(f"{path}: a line is longer than {MAX_LINE_BYTES // MIB} MiB; write one document a line")
    if size:
        yield b"".join(unfinished)


# ---------------------------------------------------------------------------------------------------
# Encodings


def decode(path: Source, line: int, raw: bytes) -> str:
    """Decode bytes that begin on line `line` (from 1); BadShard names the line that is not UTF-8 and the fix."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise BadShard(f"{path}, line {line}: {not_utf8(path, raw)}", path) from error


def not_utf8(path: Source, raw: bytes) -> str:
    """What these bytes of a file probably are, since they are not UTF-8, and the command that converts the file."""
    characters = raw.decode("utf-8", "surrogateescape")
    bad = sum("\udc80" <= character <= "\udcff" for character in characters)
    good = sum(character >= "\x80" for character in characters) - bad
    if good > bad:  # in another encoding hardly any bytes would be valid
        return f"{bad} bytes are not valid UTF-8; leave such bytes out: {conversion(path, 'UTF-8', '-c ')}"
    try:
        raw.decode("cp1252")
        encoding = "CP1252"  # Latin-1 with more characters, as Windows writes it
    except UnicodeDecodeError:
        encoding = "ISO-8859-1"
    return f"not valid UTF-8 but perhaps Latin-1 ({encoding}); {conversion(path, encoding)}"


def wide_encoding(sample: bytes) -> str:
    """iconv's name for the UTF-16 or UTF-32 that a file's beginning is in, with or without BOM; "" if in neither.

    Without one, their NULs tell: characters below U+0100 have them, always on the same side. One or two NULs tell
    nothing.
    """
    for bom, name in WIDE_BOMS.items():
        if sample.startswith(bom):
            return name
    if sample.count(0) < 3:
        return ""
    if sample.count(0) > 0.6 * len(sample):
        return "UTF-32LE" if sample[::4].count(0) < sample[3::4].count(0) else "UTF-32BE"
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    share = max(even, odd) / max(1, len(sample) // 2)
    one_sided = min(even, odd) <= 0.05 * max(even, odd)
    if one_sided and (share > 0.2 or (share > 0.02 and max(even, odd) >= 8 and not min(even, odd))):
        return "UTF-16LE" if odd > even else "UTF-16BE"
    return ""


def conversion(path: Source, encoding: str, options: str = "") -> str:
    """The shell command that rewrites a file as UTF-8 in place."""
    iconv = f"iconv {options}-f {encoding} -t UTF-8"
    if isinstance(path, RemoteFile):
        return f"convert it with {iconv}"
    name = path.name.lower()
    tool = "gzip" if name.endswith(".gz") else "zstd" if name.endswith(".zst") else ""
    change = f'{tool} -dc "$f" | {iconv} | {tool} -c' if tool else f'{iconv} "$f"'
    return f'convert it: f={shlex.quote(str(path))}; {change} > "$f.new" && mv "$f.new" "$f"'
