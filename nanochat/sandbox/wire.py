"""The protocol between the sandbox's processes: length-prefixed JSON frames. Standard library only.

Received data is only ever parsed as data, so a malicious sender gains nothing.
"""

import json
import os
import select
import struct
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_FRAME_BYTES = 64 << 20
# {tag: (type, to a simpler value, and back)} of the values that JSON lacks
TYPES: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "tuple": (tuple, list, tuple),
    "dict": (dict, lambda value: list(map(list, value.items())), dict),
    "set": (set, list, set),
    "frozenset": (frozenset, list, frozenset),
    "int": (int, hex, lambda text: int(text, 16)),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytes, bytearray),
    "complex": (complex, lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    "fraction": (Fraction, str, Fraction),
    "decimal": (Decimal, str, Decimal),
    "deque": (deque, lambda value: [list(value), value.maxlen], lambda parts: deque(*parts)),
    "counter": (Counter, dict, Counter),
    "ordered": (OrderedDict, dict, OrderedDict),
}


class Gone(Exception):
    """The other side has closed the channel, or sent an invalid frame."""


def frame_of(value: Any) -> bytes:
    """`value` as JSON after its length. Surrogates in text survive: JSON's escapes would join pairs of them."""
    body = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return struct.pack(">I", len(body)) + body


def write_frame(fd: int, value: Any) -> None:
    """Send `value`. Raises Gone if the channel is closed."""
    data = memoryview(frame_of(value))
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError as error:
        raise Gone(str(error)) from error


def read_frame(fd: int, deadline: float | None = None) -> Any:
    """Read exactly one frame. Raises Gone at the end, TimeoutError after `deadline` (time.monotonic)."""
    (size,) = struct.unpack(">I", _read_exactly(fd, 4, deadline))
    if size > MAX_FRAME_BYTES:
        raise Gone(f"a frame of {size} bytes")
    return _parse(_read_exactly(fd, size, deadline))


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise Gone("invalid JSON") from error


def _read_exactly(fd: int, size: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        if deadline is not None:
            poller = select.poll()  # select.select only handles descriptors below 1024
            poller.register(fd, select.POLLIN)
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
        try:
            piece = os.read(fd, min(size - len(data), 1 << 16))
        except OSError as error:
            raise Gone(str(error)) from error
        if not piece:
            raise Gone("closed")
        data += piece
    return bytes(data)


def parse_frame(data: bytes) -> Any:
    """The frame at the start of `data`, None while incomplete. Raises Gone on invalid JSON."""
    if len(data) < 4:
        return None
    (size,) = struct.unpack(">I", data[:4])
    return _parse(data[4 : 4 + size]) if size <= len(data) - 4 else None


def pack(value: Any) -> Any:
    """A plain value as JSON types. Exact types only, no subclasses: raises TypeError on anything else."""
    kind = type(value)
    if value is None or kind in (bool, float, str) or (kind is int and value.bit_length() < 1000):
        return value  # JSON's conversion of long integers is slow, and limited
    if kind is list:
        return [pack(item) for item in value]
    for tag, (tagged, take_apart, _) in TYPES.items():
        if kind is tagged:
            return {tag: pack(take_apart(value))}
    raise TypeError(f"{kind.__name__} cannot be passed between a program and its tests: plain values only")


def unpack(value: Any) -> Any:
    """Inverse of `pack`. Raises ValueError or TypeError on anything else."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag not in TYPES:
        raise ValueError(f"unknown tag {tag!r}")
    return TYPES[tag][2](unpack(content))
