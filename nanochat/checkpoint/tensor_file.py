"""Safetensors files, streamed one tensor at a time and hashed on the way (format: github.com/huggingface/safetensors).

Not the safetensors library, for three reasons: it reports a full disk as its own exception instead of an OSError; it
memory-maps files when reading, so that a file truncated meanwhile kills the process; and read from bytes instead, a
file is in memory twice. Here the bytes that were hashed are the bytes that the caller holds.
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, StringConstraints
from typing_extensions import TypedDict

from nanochat.common import UserError, first_line
from nanochat.common.files import check_value, open_file, parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_file(path: Path, chunks: Iterable[Any]) -> dict[str, Any]:
    """Write `chunks` (bytes-like) to a new file and flush it to disk; returns its SHA-256 and size."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += memoryview(chunk).nbytes
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "bytes": size}


def tensor_chunks(
    tensors: Mapping[str, torch.Tensor | np.ndarray], metadata: Mapping[str, str] | None = None
) -> Iterator[Any]:
    """A safetensors file in chunks: the header, then each tensor's bytes, widest dtype first (alignment)."""
    # Arrays are copied, because a read-only one cannot become a tensor.
    named = {
        name: value.detach() if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
        for name, value in tensors.items()
    }
    order = sorted(named, key=lambda name: (-named[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        begin, end = end, end + named[name].numel() * named[name].element_size()
        dtype, shape = DTYPE_NAMES[named[name].dtype], list(named[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        flat = named[name].to("cpu").contiguous().reshape(-1)
        # An empty array has stride 0, which view(uint8) rejects.
        yield flat.as_strided((flat.numel(),), (1,), flat.storage_offset()).view(torch.uint8).numpy()


MAX_HEADER_BYTES = 16 * 2**20  # of some hundred thousand tensors
MAX_SIZE = 2**48  # of a dimension, or of a file

Size = Annotated[int, Field(ge=0, le=MAX_SIZE)]
Name = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=300)]  # shown in errors


class Entry(TypedDict):
    """A tensor in the header. Its bytes are [begin, end) of what follows the header."""

    dtype: Literal[*DTYPES]  # type: ignore[valid-type]
    shape: Annotated[list[Size], Field(max_length=16)]
    data_offsets: tuple[Size, Size]


def read_shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of a file's tensors by name, from its header alone. Raises UserError as read_tensors does."""
    return {name: entry["shape"] for name, entry in read_entries(path).items()}


def read_entries(path: Path, follow_links: bool = False) -> dict[str, Entry]:
    """The header: each tensor's dtype, shape and place, in the order of the file. Raises UserError."""
    with open_file(path, follow_links) as file, readable(path):
        return _read_header(path, file)[0]


def read_tensor(path: Path, name: str, follow_links: bool = False) -> torch.Tensor:
    """One tensor of a file, without the memory for the others. Raises UserError, also if it has no tensor `name`."""
    with open_file(path, follow_links) as file, readable(path):
        found = os.fstat(file.fileno())
        entries, start = _known_header(path, follow_links, (found.st_ino, found.st_mtime_ns, found.st_size))
        if name not in entries:
            raise UserError(f"{path} has no tensor {name}")
        entry = entries[name]
        begin, end = entry["data_offsets"]
        file.seek(start + begin)
        flat = torch.empty(end - begin, dtype=torch.uint8)
        if file.readinto(flat.numpy().data) != end - begin:
            raise UserError(f"{path} is damaged: it ends inside {name}")
        return flat.view(DTYPES[entry["dtype"]]).view(entry["shape"])


@functools.lru_cache(maxsize=2)
def _known_header(path: Path, follow_links: bool, version: tuple[int, int, int]) -> tuple[dict[str, Entry], int]:
    """The header and its size; read once for all tensors of a file, which would take quadratic time."""
    with open_file(path, follow_links) as file:
        entries, header = _read_header(path, file)
    return entries, len(header)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the errors of a disk that fails, and of too little memory, into a UserError that names the file."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error


def read_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, torch.Tensor], str]:
    """Read a file; returns its tensors, each with its own storage, and the SHA-256 of the bytes they were read from.

    Raises UserError if it is not a regular file, or not a safetensors file.
    """
    with open_file(path, follow_links=False) as file:
        entries, header = _read_header(path, file)
        digest, tensors = hashlib.sha256(header), {}
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            try:
                flat = torch.empty(end - begin, dtype=torch.uint8)
                tensors[name] = flat.view(DTYPES[entry["dtype"]]).view(entry["shape"])
                data = flat.numpy().data
                if file.readinto(data) != end - begin:
                    raise UserError(f"{path} is damaged: it ends inside {name}")
            except (RuntimeError, OSError) as error:  # no memory for it, or the disk fails
                raise UserError(f"{path}: {name} cannot be read: {first_line(error)}") from error
            digest.update(data)
            tensors[name] = tensors[name].to(device)
        if file.read(1):
            raise UserError(f"{path} is damaged: it continues after its last tensor")
    return tensors, digest.hexdigest()


def _read_header(path: Path, file: io.BufferedReader) -> tuple[dict[str, Entry], bytes]:
    """The tensors' entries in the order of their bytes, which are those that follow in the file; and the header."""
    length = file.read(8)
    size = int.from_bytes(length, "little")
    if len(length) < 8 or size > MAX_HEADER_BYTES:
        raise UserError(f"{path} is not a safetensors file: its header cannot have {size:,} bytes")
    text = file.read(size)
    entries = parse_json(text, path, dict[str, Any])
    entries.pop("__metadata__", None)
    entries = check_value(entries, path, dict[Name, Entry])
    position, left = 0, os.fstat(file.fileno()).st_size - file.tell()
    ordered = dict(sorted(entries.items(), key=lambda item: item[1]["data_offsets"]))
    for name, entry in ordered.items():
        begin, end = entry["data_offsets"]
        if begin != position or end - begin != math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize:
            raise UserError(f"{path} is damaged: its header is inconsistent at {name}")
        position = end
    if position > left:
        raise UserError(f"{path} is damaged: its tensors have {position:,} bytes, of which it holds {left:,}")
    return ordered, length + text
