"""Safetensors files, streamed one tensor at a time and hashed on the way (format: github.com/huggingface/safetensors).

Not the safetensors library, for three reasons: it reports a full disk as its own exception instead of an OSError; it
memory-maps files when reading, so that a file truncated meanwhile kills the process; and read from bytes instead, a
file is in memory twice. Here the bytes that were hashed are the bytes that the caller holds. Imports nothing from
nanochat.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

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


def tensor_chunks(tensors: Mapping[str, torch.Tensor | np.ndarray]) -> Iterator[Any]:
    """A safetensors file in chunks: the header, then each tensor's bytes, widest dtype first (alignment)."""
    # Arrays are copied, because a read-only one cannot become a tensor.
    named = {
        name: value.detach() if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
        for name, value in tensors.items()
    }
    order = sorted(named, key=lambda name: (-named[name].element_size(), name))
    header, end = {}, 0
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


def read_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, torch.Tensor], str]:
    """Read a file; returns its tensors, each with its own storage, and the SHA-256 of the bytes they were read from.

    Raises ValueError, KeyError or TypeError if it is not a safetensors file.
    """
    digest, tensors, position = hashlib.sha256(), {}, 0
    with open(path, "rb") as file:
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), os.fstat(file.fileno()).st_size))
        digest.update(length + header)
        entries = json.loads(header)
        if not isinstance(entries, dict):
            raise ValueError("its header is not an object")
        entries.pop("__metadata__", None)
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            shape, dtype = entry["shape"], DTYPES[entry["dtype"]]
            if begin != position or min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"its header is inconsistent at {name}")
            flat = torch.empty(min(end, os.fstat(file.fileno()).st_size) - begin, dtype=torch.uint8)
            data = flat.numpy().data
            if file.readinto(data) != end - begin:
                raise ValueError(f"it ends inside {name}")
            digest.update(data)
            tensors[name] = flat.view(dtype).view(shape).to(device)
            position = end
        if file.read(1):
            raise ValueError("it continues after its last tensor")
    return tensors, digest.hexdigest()
