"""Reading files that somebody else may have written: regular files of limited size, JSON checked against a type.

A type is what pydantic takes: a TypedDict, a dataclass, `dict[str, int]`. Numbers are not made from strings, nor
integers from booleans or fractions. Whatever is wrong is a UserError that names the file and the place in it.
"""

import contextlib
import functools
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from nanochat.common import UserError, first_line

JSON_BYTES = 64 * 2**20  # a tokenizer of a million tokens is smaller

Extra = Literal["allow", "ignore", "forbid"] | None  # for fields that the type does not have; None as it says itself


@contextlib.contextmanager
def open_file(path: Path | str, follow_links: bool = True) -> Iterator[io.BufferedReader]:
    """Open a regular file for reading. Raises UserError for a missing one and, at once, for pipes, devices and folders;
    for links too unless they are to be followed."""
    try:
        if not stat.S_ISREG(os.stat(path, follow_symlinks=follow_links).st_mode):
            raise UserError(f"{path} is not a regular file; replace it by one")
        # In case it becomes a link or a pipe between the two calls. Windows has neither flag.
        flags = getattr(os, "O_NONBLOCK", 0) | (0 if follow_links else getattr(os, "O_NOFOLLOW", 0))
        file = open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags))  # noqa: SIM115
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        yield file


def read_file(path: Path | str, max_bytes: int = JSON_BYTES, follow_links: bool = True) -> bytes:
    """The contents of a regular file of at most `max_bytes`; UserError for any other."""
    with open_file(path, follow_links) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            data = file.read(size + 1) if size <= max_bytes else None  # read() allocates as much as it is asked for
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if data is None or len(data) > max_bytes:
        raise UserError(f"{path} is larger than {max_bytes:,} bytes: it cannot be what it is named")
    return data


def read_json(path: Path | str, shape: Any = Any, follow_links: bool = True, extra: Extra = None) -> Any:
    """A JSON file's value, of type `shape`; UserError if it is none, or nested more than 200 deep."""
    return parse_json(read_file(path, follow_links=follow_links), path, shape, extra)


def parse_json(data: bytes, where: object, shape: Any = Any, extra: Extra = None) -> Any:
    """The value of JSON text, of type `shape`. UserError names it as `where`."""
    try:
        return adapter(shape).validate_json(data, strict=True, extra=extra)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = repr(".".join(map(str, first["loc"])))[1:-1][:120]  # without line breaks and escapes
        reason = first_line(first.get("ctx", {}).get("error", first["msg"]))
        raise UserError(f"{where} is damaged or of another version: {place and place + ': '}{reason}") from error


def check_value(value: Any, where: object, shape: Any, extra: Extra = None) -> Any:
    """`value`, which was read from JSON or YAML, as a `shape`."""
    try:
        text = to_json(value, inf_nan_mode="constants")
    except ValueError as error:  # YAML may refer to itself
        raise UserError(f"{where} is damaged: {first_line(error)}") from error
    return parse_json(text, where, shape, extra)


adapter = functools.cache(TypeAdapter)  # building one takes about a millisecond
