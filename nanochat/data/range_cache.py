"""Pieces of remote files, kept on a disk of this machine within a budget, shared by all processes that use the folder.

A piece never changes: its name says of which version of which file it is, and from where to where. It appears by a
rename, carries a digest of its bytes, and is read into memory whole, so that whoever deletes it takes it from nobody.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from nanochat.common import atomic_write, warn

DIGEST_BYTES = 16
KEPT_SHARE = 0.75  # of the budget, once something had to go: room to write before the next time
COUNT_SHARE = 0.01  # of the budget: after writing so much, a process counts again what all have written
STRIPES = 1024  # locks, so that two processes seldom wait for each other over different pieces
ABANDONED_SECONDS = 3600.0  # after which a temporary file belongs to nobody


class PieceCache:
    """The pieces in `folder`, at most `budget_bytes` of them; 0 keeps none. Any thread may use it.

    A disk that is full or fails is told once and costs the keeping, not the reading.
    """

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self.folder, self.budget = folder, budget_bytes
        self.counted = self.written = -1  # bytes in the folder when last counted, and written here since
        self.failed = False
        self.lock = threading.Lock()

    def get(self, name: str, fetch: Callable[[], bytes], patience: float) -> bytes:
        """The piece `name`, from the disk or else from `fetch`, which one process at a time calls; kept for later."""
        data = self.load(name) if self.budget > 0 else None
        if data is not None:
            return data
        if self.budget <= 0 or self.failed:
            return fetch()
        with ExitStack() as held:
            stripe = int(hashlib.blake2b(name.encode(), digest_size=4).hexdigest(), 16) % STRIPES
            try:
                (self.folder / ".locks").mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(self.folder / ".locks" / f"{stripe:04d}", timeout=patience))
            except Timeout:
                pass  # whoever holds it has no luck with the network either
            except OSError as error:
                self._fail(error)
                return fetch()
            data = self.load(name)
            if data is None:
                data = fetch()
                self.store(name, data)
        return data

    def load(self, name: str) -> bytes | None:
        """The piece, or None if it is not there. A damaged one is deleted."""
        path = self.path(name)
        try:
            content = path.read_bytes()
            if content[:DIGEST_BYTES] == digest(content[DIGEST_BYTES:]):
                with suppress(OSError):  # a folder that is only read
                    os.utime(path)  # used last: goes last
                return content[DIGEST_BYTES:]
            warn(f"{path} is damaged: fetching it again")
            path.unlink()
        except OSError:
            pass
        return None

    def store(self, name: str, data: bytes) -> None:
        """Keep a piece. It is worth no flush to the disk: one that a power cut damages is fetched again."""
        path = self.path(name)
        try:
            with atomic_write(path, durable=False) as file:
                file.write(digest(data) + data)
            with self.lock:
                self.written += len(data)
                if self.counted < 0 or self.written > COUNT_SHARE * self.budget:
                    self.counted, self.written = self._evict(), 0
        except OSError as error:
            self._fail(error)

    def path(self, name: str) -> Path:
        """Where a piece lies."""
        return self.folder / name[:2] / name

    def _evict(self) -> int:
        """Delete the pieces used longest ago if there is too much; bytes that are left."""
        found = []  # (last used, bytes, path)
        for folder in os.scandir(self.folder):
            if folder.name.startswith(".") or not folder.is_dir():
                continue
            for entry in os.scandir(folder.path):
                with suppress(OSError):  # another process deletes, too
                    stat = entry.stat()
                    if not entry.name.startswith("."):
                        found.append((stat.st_mtime, stat.st_size, entry.path))
                    elif time.time() - stat.st_mtime > ABANDONED_SECONDS:
                        os.unlink(entry.path)
        total = sum(size for _, size, _ in found)
        if total > self.budget * (1 - COUNT_SHARE):
            for _, size, path in sorted(found):
                if total <= KEPT_SHARE * self.budget:
                    break
                with suppress(OSError):
                    os.unlink(path)
                total -= size
        return total

    def _fail(self, error: OSError) -> None:
        if not self.failed:
            warn(f"{self.folder} cannot keep what is fetched ({error.strerror or error}): going on without keeping it")
        self.failed = True


def digest(data: bytes) -> bytes:
    """What stands before a piece's bytes on the disk."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
