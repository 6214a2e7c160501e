"""Clients that put a server under load: honest ones, which are timed, and hostile ones.

They use plain sockets, to cost little on the machine that they share with the server.
"""

import asyncio
import functools
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

CHAT = "/v1/chat/completions"


@dataclass
class Seen:
    """Measurements of all clients together. Times in seconds."""

    first_token: list[float] = field(default_factory=list)  # from the request to the first piece of text
    between_tokens: list[float] = field(default_factory=list)
    tokens: int = 0
    whole: int = 0  # complete streams
    cut: int = 0  # streams that ended early
    statuses: Counter[int] = field(default_factory=Counter)
    actions: Counter[str] = field(default_factory=Counter)


def request(body: Any, length: int | None = None) -> bytes:
    """The bytes of a POST; `length` is announced instead of the true one."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content) if length is None else length}\r\n\r\n"
    ).encode() + content


@asynccontextmanager
async def connect(
    port: int, receive_bytes: int = 0, abruptly: bool = False
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection, closed at the end; `abruptly`: with a reset, as when a process dies."""
    made = socket.socket()
    made.setblocking(False)
    if receive_bytes:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    if abruptly:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=made)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def read_head(reader: asyncio.StreamReader, seen: Seen) -> int:
    """Read the head of a response; returns its status."""
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head[9:12])
    seen.statuses[status] += 1
    return status


async def read_stream(port: int, body: Any, seen: Seen, max_events: float = float("inf")) -> None:
    """Send a chat request and read its stream, timed; disconnect after `max_events`."""
    async with connect(port, abruptly=max_events < 5) as (reader, writer):
        sent = last = time.perf_counter()
        writer.write(request({**body, "stream": True}))
        if await read_head(reader, seen) != 200:
            await asyncio.sleep(0.2)
            return
        count = 0
        while count < max_events:
            line = await reader.readline()
            if line.startswith(b"data: [DONE]"):
                seen.whole += 1
                return
            if not line:
                seen.cut += 1
                return
            if not line.startswith(b"data: ") or b'"content": "' not in line or b'"role"' in line:
                continue
            now = time.perf_counter()
            (seen.between_tokens if count else seen.first_token).append(now - (last if count else sent))
            last, count = now, count + 1
            seen.tokens += 1


# ---------------------------------------------------------------------------------------------------
# Hostile clients


def chat(rng: random.Random, **changes: Any) -> dict[str, Any]:
    words = ["Tell", "me", "a", "story", "about", "the", "sea", "and", "12", "+", "30", "?", "Hello", "who", "are"]
    text = " ".join(rng.choices(words, k=rng.randint(1, 60)))
    return {"messages": [{"role": "user", "content": text}], "seed": rng.randrange(2**31), **changes}


async def honest(port: int, rng: random.Random, seen: Seen) -> None:
    await read_stream(port, chat(rng, max_tokens=64), seen)


async def leaves_in_the_middle(port: int, rng: random.Random, seen: Seen) -> None:
    await read_stream(port, chat(rng, max_tokens=256, n=rng.randint(1, 3)), Seen(), rng.randint(1, 20))


async def leaves_at_once(port: int, rng: random.Random, seen: Seen) -> None:
    async with connect(port, abruptly=rng.random() < 0.5) as (_, writer):
        writer.write(request(chat(rng, max_tokens=256, stream=rng.random() < 0.5)))
        await writer.drain()
        await asyncio.sleep(rng.random() * 0.2)


async def sends_nonsense(port: int, rng: random.Random, seen: Seen) -> None:
    bodies = [
        rng.randbytes(1000),
        b"[" * 100_000 + b"]" * 100_000,
        b"{",
        b"",
        b"null",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        json.dumps(chat(rng, n=-1)).encode(),
        json.dumps(chat(rng, temperature=-5)).encode(),
    ]
    async with connect(port) as (reader, writer):
        writer.write(request(rng.choice(bodies)) if rng.random() < 0.8 else rng.randbytes(3000) + b"\r\n\r\n")
        await read_head(reader, seen)


@functools.cache
def structures() -> list[bytes]:
    """Bodies that take a parser and its checks long."""
    return [
        b"[" + b",".join([b'{"a":1}'] * 500_000) + b"]",
        b'{"messages":[{"role":"user","content":[' + b",".join([b'{"type":"text","text":""}'] * 150_000) + b"]}]}",
        b'{"messages":[' + b",".join([b"[]"] * 1_000_000) + b"]}",
        b'{"prompt":[' + b",".join([b"1"] * 2_000_000) + b"]}",
        b'{"logit_bias":{' + b",".join(b'"%d":1' % number for number in range(350_000)) + b"}}",
        b'{"a":' * 800_000,
    ]


async def sends_structures(port: int, rng: random.Random, seen: Seen) -> None:
    async with connect(port) as (reader, writer):
        writer.write(request(rng.choice(structures())[: 4 * 2**20]))
        await read_head(reader, seen)


async def sends_chunks_of_a_byte(port: int, rng: random.Random, seen: Seen) -> None:
    async with connect(port) as (reader, writer):
        writer.write(request(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
        writer.write(b"1\r\n \r\n" * 50_000 + b"0\r\n\r\n")
        await read_head(reader, seen)


async def sends_too_much(port: int, rng: random.Random, seen: Seen) -> None:
    piece = b"x" * 65536
    async with connect(port) as (reader, writer):
        if rng.random() < 0.5:
            writer.write(request(b"", 10**7 if rng.random() < 0.5 else 10**15))
        else:
            writer.write(request(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
            piece = f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
        for _ in range(150):  # ten megabytes, or until the server closes the connection
            writer.write(piece)
            await writer.drain()
        await read_head(reader, seen)


async def does_not_read(port: int, rng: random.Random, seen: Seen) -> None:
    async with connect(port, receive_bytes=2048) as (_, writer):
        much = {"max_tokens": 256, "n": 8, "logprobs": True, "top_logprobs": 20, "stream": rng.random() < 0.7}
        writer.write(request(chat(rng, **much)))
        await writer.drain()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(rng.uniform(1, 15))


async def does_not_finish(port: int, rng: random.Random, seen: Seen) -> None:
    whole = request(chat(rng))
    async with connect(port) as (_, writer):
        for byte in whole[: rng.randrange(len(whole))][:200]:
            writer.write(bytes([byte]))
            await asyncio.sleep(rng.random() * 0.02)
        await asyncio.sleep(rng.uniform(0, 5))


HOSTILE = {
    honest: 4,
    leaves_in_the_middle: 3,
    leaves_at_once: 3,
    sends_nonsense: 3,
    sends_structures: 1,
    sends_chunks_of_a_byte: 1,
    sends_too_much: 1,
    does_not_read: 2,
    does_not_finish: 2,
}


async def hostile_client(port: int, number: int, until: float, seen: Seen) -> None:
    """Random actions until the time is up. Errors are expected, since the client misbehaves."""
    rng = random.Random(number)
    while time.monotonic() < until:
        (act,) = rng.choices(list(HOSTILE), weights=list(HOSTILE.values()))
        seen.actions[act.__name__] += 1
        try:
            await asyncio.wait_for(
                act(port, rng, seen), until + 5 - time.monotonic() if act is honest else until - time.monotonic()
            )
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            await asyncio.sleep(0.05)


async def honest_client(port: int, number: int, until: float, max_tokens: int, seen: Seen) -> None:
    rng = random.Random(number)
    while time.monotonic() < until:
        await read_stream(port, chat(rng, max_tokens=max_tokens), seen)
