"""Byte ranges of remote files, kept on disk within a size limit, shared by all processes that use the folder.

A range never changes: its name holds the version of the file, start and end. It appears in one rename, carries a digest
of its bytes, and is read into memory whole, so that deleting it disturbs no reader.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from nanochat.common import atomic_write, warn

DIGEST_BYTES = 16
EVICTED_SHARE = 0.75  # of the limit that is left after an eviction: room to write before the next one
COUNT_SHARE = 0.01  # of the limit: after writing so much, a process measures the folder again
ABANDONED_SECONDS = 3600.0  # age at which a temporary file is a dead process's


class RangeCache:
    """Byte ranges in `folder`, at most `max_bytes` of them; 0 keeps none. Thread-safe.

    A disk that is full or fails costs a warning and the caching, not the reading.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.counted = self.written = -1  # bytes in the folder when last measured, and written here since
        self.failed = False
        self.lock = threading.Lock()

    def get(self, name: str, fetch: Callable[[], bytes]) -> bytes:
        """The range `name`, from disk or else from fetch()."""
        data = self.load(name) if self.max_bytes > 0 else None
        if data is None:
            data = fetch()
            if self.max_bytes > 0 and not self.failed:
                self.store(name, data)
        return data

    def load(self, name: str) -> bytes | None:
        """The range, or None if it is not there. A damaged one is deleted."""
        path = self.path(name)
        try:
            content = path.read_bytes()
            if content[:DIGEST_BYTES] == digest(content[DIGEST_BYTES:]):
                with suppress(OSError):  # a read-only folder
                    os.utime(path)  # the least recently used is evicted first
                return content[DIGEST_BYTES:]
            warn(f"{path} is damaged: fetching it again")
            path.unlink()
        except OSError:
            pass
        return None

    def store(self, name: str, data: bytes) -> None:
        """Keep a range. Not flushed to the disk: one that a power failure damages is fetched again."""
        try:
            with atomic_write(self.path(name), durable=False) as file:
                file.write(digest(data) + data)
            with self.lock:
                self.written += len(data)
                if self.counted < 0 or self.written > COUNT_SHARE * self.max_bytes:
                    self.counted, self.written = self._evict(), 0
        except OSError as error:
            if not self.failed:
                problem = f"({error.strerror or error}): continuing without a cache"
                warn(f"cannot cache fetched data in {self.folder} {problem}")
            self.failed = True

    def path(self, name: str) -> Path:
        """The file of a range."""
        return self.folder / name[:2] / name

    def _evict(self) -> int:
        """Delete the least recently used ranges if there is too much; the bytes that are left."""
        found = []  # (last used, bytes, path)
        for folder in os.scandir(self.folder):
            if folder.name.startswith(".") or not folder.is_dir():
                continue
            for entry in os.scandir(folder.path):
                with suppress(OSError):  # another process may have deleted it
                    stat = entry.stat()
                    if not entry.name.startswith("."):
                        found.append((stat.st_mtime, stat.st_size, entry.path))
                    elif time.time() - stat.st_mtime > ABANDONED_SECONDS:
                        os.unlink(entry.path)
        total = sum(size for _, size, _ in found)
        if total > self.max_bytes * (1 - COUNT_SHARE):
            for _, size, path in sorted(found):
                if total <= EVICTED_SHARE * self.max_bytes:
                    break
                with suppress(OSError):
                    os.unlink(path)
                total -= size
        return total


def digest(data: bytes) -> bytes:
    """The checksum stored before a range's bytes."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
