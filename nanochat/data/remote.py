"""Files behind URLs, read in pieces through fsspec: s3://, gs://, https://, hf://, memory:// and what else it knows.

Training reads row groups in an order that jumps all over the corpus, so what is fetched is a row group, not a file,
and its order being known, it is fetched ahead of need. Nothing here knows parquet: a reader says where a file is to be
cut. What fails for want of a network is tried again for as long as `patience_seconds` says.
"""

import hashlib
import io
import itertools
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from queue import PriorityQueue
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from nanochat.common import BadShard, UserError, get_cache_bytes, get_cache_dir, get_network_seconds, warn
from nanochat.data.filesystems import brief, list_files, open_filesystem, trouble, version_of
from nanochat.data.range_cache import PieceCache
from nanochat.distributed.signals import raise_if_stop_requested

Result = TypeVar("Result")

CHUNK_BYTES = 8 * 2**20  # where a reader does not say where to cut
TAIL_BYTES = 64 * 2**10  # read first of a parquet file's end; larger footers take a second read
THREADS = 16  # that fetch
MOST_PENDING = 256  # pieces asked for in advance and not taken yet
FIRST_PATIENCE_SECONDS = 10.0  # until the other side has answered once: an address may be wrong
FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 0.5, 10.0
TELL_SECONDS = 10.0  # between two words about a network that fails
URGENT, AHEAD = 0, 1


def is_url(data: str) -> bool:
    """True for what names a file system, such as s3://bucket/folder."""
    return "://" in data


@dataclass(frozen=True)
class RemoteFile:
    """A file as it was listed. `version` changes when it is written again (an etag, else a time)."""

    url: str
    size: int
    version: str
    path: str = field(compare=False)  # in its file system
    remote: "Remote" = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[Any, ...]:  # to a process of our own, which reads through a Remote of its own
        return _reopened, (self.url, self.size, self.version, self.path, str(self.remote.base_dir))

    def __lt__(self, other: "RemoteFile") -> bool:
        return self._place.split("/") < other._place.split("/")  # as paths compare

    @property
    def name(self) -> str:
        """The last part of its path."""
        return PurePosixPath(self._place).name

    @property
    def _place(self) -> str:
        """The path as it is on a disk: on the web it is quoted, and elsewhere # and ? are letters like any other."""
        return unquote(urlsplit(self.url).path) if self.url.startswith("http") else self.path

    @property
    def key(self) -> str:
        """32 hex digits, of this version of this file only."""
        text = f"{self.url}\0{self.size}\0{self.version}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def footer(self) -> bytes:
        """The end of a parquet file, from its footer on; of any other file some bytes of its end."""
        return self.remote.footer(self)

    def open(self, cut: "Cut | None" = None) -> io.RawIOBase:
        """The file, fetched piece by piece as it is read; with `cut`, pieces begin and end where it says."""
        return PiecesFile(self, self.remote.spans(self, cut) if cut else [])

    def prefetch(self, cut: "Cut", index: int) -> None:
        """Begin to fetch span `index` of `cut`, which open(cut) will want."""
        start, end = self.remote.spans(self, cut)[index]
        if end > start:
            self.remote.prefetch(self, start, end, keep=True)


Span = tuple[int, int]  # start and end in bytes
Cut = Callable[[bytes], list[Span]]  # the spans of a file to be fetched whole, from its footer


class PiecesFile(io.RawIOBase):
    """A RemoteFile to read and seek in. Spans come whole, and are kept on disk; the rest in chunks, with one ahead."""

    def __init__(self, file: RemoteFile, spans: Sequence[Span]) -> None:
        self.file, self.place = file, 0
        borders = sorted({0, file.size, *(border for span in spans for border in span)})
        whole = set(spans)
        self.pieces: list[tuple[int, int, bool]] = []
        for start, end in itertools.pairwise(borders):
            if (start, end) in whole:
                self.pieces.append((start, end, True))
            else:
                self.pieces += [(at, min(at + CHUNK_BYTES, end), False) for at in range(start, end, CHUNK_BYTES)]
        self.held: tuple[int, bytes] = (-1, b"")  # the last piece read

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.file.size}[whence])
        return self.place

    def read(self, size: int | None = -1) -> bytes:
        """As many bytes as asked for, fewer at the end of the file only."""
        end = self.file.size if size is None or size < 0 else min(self.place + size, self.file.size)
        parts = []
        while self.place < end:
            start, data = self._piece_at(self.place)
            parts.append(data[self.place - start : end - start])
            self.place += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _piece_at(self, place: int) -> tuple[int, bytes]:
        remote = self.file.remote
        low, high = 0, len(self.pieces)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.pieces[middle][0] <= place else (low, middle)
        if self.held[0] != low:
            start, end, keep = self.pieces[low]
            if not keep and low + 1 < len(self.pieces) and not self.pieces[low + 1][2] and self.held[0] == low - 1:
                remote.prefetch(self.file, *self.pieces[low + 1])  # it is being read from one end to the other
            self.held = low, remote.read(self.file, start, end, keep)
        return self.pieces[low][0], self.held[1]


class Remote:
    """Fetches pieces of the files of one file system, on threads of its own. Any thread may use it.

    Raises BadShard for a file that is gone, has changed or is denied to us, UserError when the network has failed for
    `patience_seconds` on end.
    """

    def __init__(self, fs: Any, base_dir: Path) -> None:
        self.fs, self.base_dir = fs, base_dir
        self.patience_seconds = get_network_seconds()
        self.folder = get_cache_dir(base_dir)
        self.cache = PieceCache(self.folder / "pieces", get_cache_bytes())
        self.footers = PieceCache(self.folder / "footers", 2**40)  # small, and wanted at every start: never deleted
        self.pending: OrderedDict[tuple[RemoteFile, int, int], Future[bytes]] = OrderedDict()
        self.lock = threading.Lock()
        self.good_at: float | None = None  # when the other side last answered
        self.granted = False  # something was read
        self.told_at = 0.0
        self.known: OrderedDict[RemoteFile, tuple[bytes, list[Span]]] = OrderedDict()  # footers of the last files
        self.work: PriorityQueue[Any] = PriorityQueue()
        self.number = itertools.count()
        self.threads = 0

    def read(self, file: RemoteFile, start: int, end: int, keep: bool = False) -> bytes:
        """Bytes start to end of a file. `keep`: on the disk, for the next time."""
        with self.lock:
            future = self.pending.pop((file, start, end), None)
        return self.wait(future or self._submit(URGENT, partial(self._piece, file, start, end, keep)))

    def prefetch(self, file: RemoteFile, start: int, end: int, keep: bool = False) -> None:
        """Begin to fetch what read() will be asked for, unless that is under way."""
        key = (file, start, end)
        with self.lock:
            if key in self.pending:
                return
            self.pending[key] = self._submit(AHEAD, partial(self._piece, file, start, end, keep))
            if len(self.pending) > MOST_PENDING:
                self.pending.popitem(last=False)[1].cancel()

    def footer(self, file: RemoteFile) -> bytes:
        """See RemoteFile.footer."""
        with self.lock:
            if file in self.known:
                return self.known[file][0]
        return self.wait(self._submit(URGENT, partial(self._footer, file)))

    def fetch_footers(self, files: Sequence[RemoteFile]) -> None:
        """Have the footers of all files on this machine, many at a time. A bad file is for its reader to tell."""
        for future in [self._submit(AHEAD, partial(self._footer, file)) for file in files]:
            with suppress(BadShard):
                self.wait(future)

    def spans(self, file: RemoteFile, cut: Cut) -> list[Span]:
        """Where `cut` cuts the file; remembered for the files used last."""
        with self.lock:
            if file in self.known:
                self.known.move_to_end(file)
                return self.known[file][1]
        footer = self.footer(file)
        with self.lock:
            self.known[file] = footer, cut(footer)
            if len(self.known) > MOST_PENDING:
                self.known.popitem(last=False)
            return self.known[file][1]

    def wait(self, future: "Future[Result]") -> Result:
        """A future's result; a signal, or being asked to end, is heard meanwhile."""
        while True:
            try:
                return future.result(timeout=0.2)
            except FutureTimeout:
                if future.done():
                    raise
                raise_if_stop_requested()

    def insist(self, action: Callable[[], Result], what: str) -> Result:
        """What `action` returns, again and again while the network fails."""
        began, delay = time.monotonic(), FIRST_DELAY_SECONDS
        while True:
            try:
                result = action()
                self.good_at = time.monotonic()
                return result
            except (BadShard, UserError):
                raise
            except Exception as error:
                kind = trouble(error)
                if kind is None:
                    raise
                if kind in ("missing", "shorter"):
                    is_what = "is not there (any more)" if kind == "missing" else "is shorter than when it was listed"
                    raise BadShard(f"{what} {is_what}", what) from error
                now, reached = time.monotonic(), self.good_at is not None
                if kind == "denied" and not self.granted:  # later it may be credentials that are about to be renewed
                    raise UserError(
                        f"{what}: access denied ({brief(error)}); check the address and the credentials"
                    ) from error
                patience = self.patience_seconds if reached else min(FIRST_PATIENCE_SECONDS, self.patience_seconds)
                if now - max(began, self.good_at or 0) > patience:
                    raise UserError(
                        f"{what}: no answer for {patience:g} seconds ({brief(error)}); check the network "
                        "and the address, and start again"
                    ) from error
                if now - self.told_at > TELL_SECONDS:
                    self.told_at = now
                    warn(f"{what}: {brief(error)}; trying again for {patience:g} seconds")
            time.sleep(delay)
            delay = min(2 * delay, MAX_DELAY_SECONDS, patience / 10 + 0.01)

    def _piece(self, file: RemoteFile, start: int, end: int, keep: bool) -> bytes:
        fetch = partial(self._fetch, file, start, end)
        if not (keep and file.version):  # without a version it could be an old one
            return fetch()
        return self.cache.get(f"{file.key}-{start}-{end}", fetch, self.patience_seconds)

    def _fetch(self, file: RemoteFile, start: int, end: int) -> bytes:
        def action() -> bytes:
            data = self.fs.cat_file(file.path, start=start, end=end)
            if len(data) == end - start:
                self.granted = True
                return data
            if len(data) == file.size:
                raise UserError(f"{file}: its server sends whole files only; download it and give its path")
            now = self.fs.info(file.path).get("size")
            if now != file.size:
                raise BadShard(f"{file} has changed: {now:,} bytes, {file.size:,} when it was listed", file)
            raise OSError(f"received {len(data):,} of {end - start:,} bytes")

        return self.insist(action, str(file))

    def _footer(self, file: RemoteFile) -> bytes:
        def fetch() -> bytes:
            tail = self._fetch(file, max(0, file.size - TAIL_BYTES), file.size)
            size = int.from_bytes(tail[-8:-4], "little") + 8 if tail[-4:] == b"PAR1" else 0
            if not len(tail) < size < file.size:
                return tail[len(tail) - size :] if size <= len(tail) else tail
            return self._fetch(file, file.size - size, file.size - len(tail)) + tail

        if not file.size:
            return b""
        return self.footers.get(file.key, fetch, self.patience_seconds) if file.version else fetch()

    def _submit(self, urgency: int, action: Callable[[], Result]) -> "Future[Result]":
        future: Future[Result] = Future()
        self.work.put((urgency, next(self.number), future, action))
        if self.threads == 0:
            self.threads = THREADS
            for _ in range(THREADS):  # daemons: a program that ends does not wait for a network that is gone
                threading.Thread(target=_serve, args=(self.work,), name="nanochat-fetch", daemon=True).start()
            weakref.finalize(self, _dismiss, self.work)
        return future


def _serve(work: "PriorityQueue[Any]") -> None:
    while True:
        _, _, future, action = work.get()
        if future is None:
            return
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(action())
            except BaseException as error:
                future.set_exception(error)
        del future, action  # which would keep their owner from being forgotten


def _dismiss(work: "PriorityQueue[Any]") -> None:
    for number in range(THREADS):
        work.put((-1, number, None, None))


# ---------------------------------------------------------------------------------------------------
# Listing


def find_remote(data: str, usable: Callable[[PurePosixPath], Any], base_dir: Path) -> list[RemoteFile]:
    """The usable files that a URL of a file, a folder or a glob stands for, in the order of their paths; hidden ones
    left out. UserError if there are none, or it cannot be looked at."""
    fs, path = open_filesystem(data)
    remote = Remote(fs, base_dir)
    try:
        found = remote.insist(partial(list_files, fs, path, usable), data)
    except BadShard as error:
        raise UserError(f"--data {data}: there is no such file, folder or bucket") from error
    except UserError:
        raise
    except ValueError as error:  # a pattern that is none
        raise UserError(f"--data {data}: {brief(error)}") from error
    files = [
        RemoteFile(fs.unstrip_protocol(name), info["size"], version_of(info), name, remote)
        for name, info in found.items()
        if info.get("size") is not None
    ]
    if found and not files:
        raise UserError(f"--data {data}: its server does not tell sizes; download it and give its path")
    return sorted(files)


def _reopened(url: str, size: int, version: str, path: str, base_dir: str) -> RemoteFile:
    root = "/".join(url.split("/")[:3])
    return RemoteFile(url, size, version, path, _remote_of(root, base_dir))


@lru_cache(maxsize=16)
def _remote_of(root: str, base_dir: str) -> Remote:
    return Remote(open_filesystem(root)[0], Path(base_dir))
