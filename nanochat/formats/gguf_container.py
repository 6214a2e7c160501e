"""The container of GGUF, llama.cpp's file format: named values, descriptions of tensors, then the tensors.

All numbers are little-endian. Each tensor starts at a multiple of 32 bytes after the descriptions.
"""

import itertools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanochat.common import UserError, atomic_write

VERSION, ALIGNMENT = 3, 32
Q8_BLOCK = 32  # weights of a row that share a scale

Value = bool | int | float | str | Sequence[str] | Sequence[int]


@dataclass(frozen=True)
class Encoding:
    """A type of tensor: its number, the `general.file_type` of a model that mostly has it, and bytes for weights."""

    number: int
    file_type: int
    block: int
    block_bytes: int

    def num_bytes(self, tensor: torch.Tensor) -> int:
        if tensor.shape[-1] % self.block:
            raise UserError(f"q8_0 needs rows of a multiple of {self.block} weights; choose --dtype=bfloat16")
        return tensor.numel() // self.block * self.block_bytes


ENCODINGS = {
    "float32": Encoding(0, 0, 1, 4),
    "bfloat16": Encoding(30, 32, 1, 2),
    "q8_0": Encoding(8, 7, Q8_BLOCK, 2 + Q8_BLOCK),
}


def write_container(path: Path, values: Mapping[str, Value], tensors: Mapping[str, tuple[torch.Tensor, str]]) -> None:
    """Write `path`, complete or not at all. `tensors`: float32 on the CPU, each with the name of its encoding."""
    described, offset = [], 0
    for name, (tensor, dtype) in tensors.items():
        encoding, dims = ENCODINGS[dtype], tensor.shape[::-1]  # the fastest dimension first
        described.append(_text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, encoding.number, offset))
        offset += _padded(encoding.num_bytes(tensor))
    head = b"GGUF" + struct.pack("<IQQ", VERSION, len(tensors), len(values))
    head += b"".join(_text(key) + _value(value) for key, value in values.items()) + b"".join(described)
    with atomic_write(path) as file:
        for data in itertools.chain([head], (encode(tensor, dtype) for tensor, dtype in tensors.values())):
            file.write(data)
            file.write(bytes(_padded(len(data)) - len(data)))


def encode(tensor: torch.Tensor, dtype: str) -> bytes:
    """A float32 tensor's bytes in an encoding of ENCODINGS."""
    if dtype == "float32":
        return tensor.contiguous().numpy().astype("<f4", copy=False).tobytes()
    if dtype == "bfloat16":
        return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().astype("<i2", copy=False).tobytes()
    rows = tensor.contiguous().numpy().reshape(-1, Q8_BLOCK)
    scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    scaled = rows * np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    quantized = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    return np.concatenate([scale.astype("<f2").view(np.int8), quantized], axis=1).tobytes()


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    """A value with its type: bool, uint32, float32, string, or array of strings or int32."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    texts = [item for item in value if isinstance(item, str)]
    if len(texts) == len(value):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, texts))
    return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
