"""The protocol between the sandbox's processes: length-prefixed JSON frames. Standard library only.

Received data is only ever parsed as data, so a malicious sender gains nothing.
"""

import json
import os
import select
import struct
import time
from typing import Any

MAX_FRAME_BYTES = 64 << 20
TAGS: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset}


class Gone(Exception):
    """The other side has closed the channel, or sent an invalid frame."""


def frame_of(value: Any) -> bytes:
    """`value` as JSON after its length. Lone surrogates in text survive, escaped."""
    body = json.dumps(value).encode("ascii")
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
    try:
        return json.loads(_read_exactly(fd, size, deadline))
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
    if size > len(data) - 4:
        return None
    try:
        return json.loads(data[4 : 4 + size])
    except (ValueError, RecursionError) as error:
        raise Gone("invalid JSON") from error


def pack(value: Any) -> Any:
    """A plain value as JSON types. Exact types only, no subclasses: raises TypeError on anything else."""
    if value is None or type(value) in (bool, float, str):
        return value
    if type(value) is int:
        return value if value.bit_length() < 1000 else {"int": hex(value)}  # decimal conversion is slow, and limited
    if type(value) is list:
        return [pack(item) for item in value]
    if type(value) is dict:
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    if type(value) is bytes:
        return {"bytes": value.hex()}
    if type(value) is complex:
        return {"complex": [value.real, value.imag]}
    for tag, kind in TAGS.items():
        if type(value) is kind:
            return {tag: [pack(item) for item in value]}
    raise TypeError(f"{type(value).__name__} cannot be passed between a program and its tests: plain values only")


def unpack(value: Any) -> Any:
    """Inverse of `pack`. Raises ValueError or TypeError on anything else."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "dict":
        return {unpack(key): unpack(item) for key, item in content}
    if tag == "int":
        return int(content, 16)
    if tag == "bytes":
        return bytes.fromhex(content)
    if tag == "complex":
        return complex(*content)
    if tag not in TAGS:
        raise ValueError(f"unknown tag {tag!r}")
    return TAGS[tag]([unpack(item) for item in content])
