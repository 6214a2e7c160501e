"""Mutations of a checkpoint's files: what a damaged disk, another program or an attacker may leave in their place."""

import hashlib
import json
import math
import os
import random
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from nanochat.common import json_hash

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    2**31,
    2**63,
    10**30,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "1",
    "x" * 1000,
    "../../../../etc/passwd",
    "\0",
    [],
    [1, 2],
    [[]] * 50,
    {},
    {"a": {"b": []}},
]


def mutate_json(text: bytes, rng: random.Random) -> bytes:
    """JSON with a value replaced, removed or added somewhere; or text that nests very deeply."""
    if rng.random() < 0.03:
        return rng.choice([b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 50_000])
    root = [json.loads(text)]
    for _ in range(rng.randint(1, 2)):
        parent, key = root, 0
        while isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.85:
            parent = parent[key]
            key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        action = rng.random()
        if action < 0.15 and parent is not root:
            del parent[key]
        elif action < 0.25 and isinstance(parent, dict):
            parent[rng.choice(["extra", "", "__class__", "../x", key + "x"])] = rng.choice(VALUES)
        elif action < 0.4 and isinstance(parent[key], int):
            parent[key] += rng.choice([-1, 1, 1000, 10**9])
        else:
            parent[key] = rng.choice(VALUES)
    return json.dumps(root[0]).encode()


def mutate_tensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, or another length of it."""
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    if rng.random() < 0.2:
        return rng.choice([0, 1, size - 1, size + 8, 2**40, 2**64 - 1]).to_bytes(8, "little") + header + rest
    header = mutate_json(header, rng)
    return len(header).to_bytes(8, "little") + header + rest


def mutate_values(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with other numbers, or another shape or type, in one of its tensors."""
    tensors = safetensors.torch.load(data)
    name = rng.choice(sorted(tensors))
    flat = tensors[name].flatten().clone()
    action = rng.random()
    if action < 0.6 and flat.numel():
        limits = (-1, 0, 1, 2, 255, 2**15, 2**31 - 1, 2**62) if not flat.is_floating_point() else (-1.0, 1e30, math.nan)
        fits = [v for v in limits if flat.is_floating_point() or in_range(v, flat.dtype)]
        flat[rng.randrange(flat.numel())] = rng.choice(fits)
        tensors[name] = flat.view(tensors[name].shape)
    elif action < 0.75:
        tensors[name] = flat[: rng.randint(0, flat.numel())].contiguous()
    elif action < 0.9:
        tensors[name] = flat.to(rng.choice([torch.float32, torch.int64, torch.uint8, torch.bool, torch.bfloat16]))
    else:
        del tensors[name]
    return safetensors.torch.save(tensors)


def in_range(value: int, dtype: torch.dtype) -> bool:
    return dtype is torch.bool or torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, added, repeated or zeroed."""
    data, place = bytearray(data), rng.randrange(len(data))
    action = rng.randrange(5)
    if action == 0:
        for _ in range(rng.choice([1, 1, 20])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif action == 1:
        del data[place:]
    elif action == 2:
        data[place:place] = rng.randbytes(rng.choice([1, 8, 1000]))
    elif action == 3:
        data += data[: rng.choice([1, 1000])]
    else:
        data[place : place + 100] = bytes(len(data[place : place + 100]))
    return bytes(data)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def listening_socket(path: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)  # the path of a socket may be short only
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.fchdir(here)
    os.close(here)


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)  # sparse


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def nothing(path: Path) -> None:
    """The file is missing."""


ODD_FILES: list[Callable[[Path], Any]] = [
    fifo,
    listening_socket,
    huge,
    nothing,
    Path.mkdir,
    Path.touch,
    link_to("/dev/zero"),
    link_to("/etc/passwd"),
    link_to("/proc/self/mem"),
    link_to("nowhere"),
]


def mutate_file(path: Path, rng: random.Random) -> None:
    """Replace a file of a checkpoint by a mutation; it may become something else than a regular file."""
    data = path.read_bytes()
    path.unlink()
    if rng.random() < 0.15:
        rng.choice(ODD_FILES)(path)
    elif rng.random() < 0.3:
        path.write_bytes(mutate_bytes(data, rng))
    elif path.suffix == ".json":
        path.write_bytes(mutate_json(data, rng))
    else:
        mutate = (
            mutate_tensors if len(data) < 32 or rng.random() < 0.3 else mutate_values
        )  # of the header, or of what follows
        path.write_bytes(mutate(data, rng))


def reseal(folder: Path, name: str) -> None:
    """Make the manifest agree with what is in the folder, as an attacker would."""
    manifest = folder / "manifest.json"
    if name == "manifest.json" and (not manifest.is_file() or manifest.stat().st_size > 2**20):
        return
    try:
        content = json.loads(manifest.read_bytes())
        if name != "manifest.json":
            path = folder / name
            found = os.lstat(path)
            data = path.read_bytes() if stat.S_ISREG(found.st_mode) and found.st_size < 2**30 else b""
            content["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": found.st_size}
        content.pop("checksum", None)
        content["checksum"] = json_hash(content)
    except (OSError, ValueError, RecursionError, TypeError, AttributeError, KeyError):
        return
    manifest.unlink()
    manifest.write_text(json.dumps(content))
