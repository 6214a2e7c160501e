"""Files behind URLs, read through fsspec: s3://, gs://, https://, hf://, memory:// and whatever else it knows.

Training reads row groups in a random but known order, so it fetches byte ranges, not files, and ahead of need. Nothing
here knows parquet: the caller says which ranges of a file belong together. Network errors are retried for as long as
`patience_seconds` says.
"""

import hashlib
import io
import itertools
import threading
import time
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from fsspec.spec import AbstractBufferedFile

from nanochat.common import BadShard, UserError, get_cache_bytes, get_cache_dir, get_network_seconds, warn
from nanochat.data.filesystems import brief, classify, list_files, open_filesystem, version_of
from nanochat.data.range_cache import RangeCache
from nanochat.distributed.signals import raise_if_stop_requested

Result = TypeVar("Result")

CHUNK_BYTES = 8 * 2**20  # of what is outside the ranges that a reader names
TAIL_BYTES = 64 * 2**10  # first read from a parquet file's end; a larger footer takes a second read
BUFFER_BYTES = 2**20  # of an open file
FETCHES_AHEAD = 16  # at a time
MAX_PENDING = 256  # ranges prefetched and not read yet
MAX_FOOTERS = 256  # kept in memory
FOOTER_CACHE_BYTES = 2**40  # no limit: footers are small, and read at every start
UNREACHED_PATIENCE_SECONDS = 10.0  # until the server has answered once: the address may be wrong
FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 0.5, 10.0
WARN_SECONDS = 10.0  # between two warnings about a failing network
POLL_SECONDS = 0.2  # between checks for a stop request

Range = tuple[int, int]  # start and end in bytes
RangesOf = Callable[[bytes], list[Range]]  # a file's footer -> its ranges to be fetched whole


def is_url(data: str) -> bool:
    """True for an address in a file system, such as s3://bucket/folder."""
    return "://" in data


@dataclass(frozen=True)
class RemoteFile:
    """A file as it was listed. `version` changes when it is rewritten (an etag, else a time)."""

    url: str
    size: int
    version: str
    path: str = field(compare=False)  # in its file system
    remote: "Remote" = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.url

    def __lt__(self, other: "RemoteFile") -> bool:
        return self._path.split("/") < other._path.split("/")  # as paths compare

    @property
    def name(self) -> str:
        """The last part of its path."""
        return PurePosixPath(self._path).name

    @property
    def _path(self) -> str:
        """The path as it would be on disk. Only web addresses are quoted; elsewhere # and ? are ordinary characters."""
        return unquote(urlsplit(self.url).path) if self.url.startswith("http") else self.path

    @property
    def key(self) -> str:
        """32 hex digits that identify this version of this file."""
        text = f"{self.url}\0{self.size}\0{self.version}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def footer(self) -> bytes:
        """The end of a parquet file, from its footer on; of any other file the last bytes."""
        return self.remote.footer(self)

    def open(self, ranges_of: RangesOf | None = None) -> io.BufferedReader:
        """The file, fetched as it is read; each of `ranges_of` its footer is fetched whole."""
        return io.BufferedReader(
            RangeReader(self, self.remote.ranges(self, ranges_of) if ranges_of else []), BUFFER_BYTES
        )

    def prefetch(self, ranges_of: RangesOf, index: int) -> None:
        """Start fetching range `index` of `ranges_of`, which open(ranges_of) will read."""
        start, end = self.remote.ranges(self, ranges_of)[index]
        if end > start:
            self.remote.prefetch(self, start, end, keep=True)


Source = Path | RemoteFile  # a file on disk or behind a URL; both have a name, and str() gives the full address


class RangeReader(AbstractBufferedFile):
    """Reads a RemoteFile. Given ranges come whole and are kept on disk; the rest in chunks, one ahead of the reader."""

    def __init__(self, file: RemoteFile, whole: Sequence[Range]) -> None:
        super().__init__(file.remote.fs, file.path, cache_type="none", size=file.size)
        self.file = file
        borders = sorted({0, file.size, *(border for pair in whole for border in pair)})
        given = set(whole)
        self.ranges: list[tuple[int, int, bool]] = []  # start, end, whole
        for start, end in itertools.pairwise(borders):
            step = end - start if (start, end) in given else CHUNK_BYTES
            self.ranges += [(at, min(at + step, end), (start, end) in given) for at in range(start, end, step)]
        self.starts = [start for start, _, _ in self.ranges]
        self.held: tuple[int, bytes] = (-1, b"")  # the last range read

    def _fetch_range(self, start: int, end: int) -> bytes:
        """Bytes from `start` to `end`, or only to the end of the range that holds `start`; none at the file's end."""
        if start >= self.size:
            return b""
        number = bisect_right(self.starts, start) - 1
        if self.held[0] != number:
            self.held = number, self._read_range(number)
        first = self.starts[number]
        return self.held[1][start - first : end - first]

    def _read_range(self, number: int) -> bytes:
        start, end, whole = self.ranges[number]
        ahead = self.ranges[number + 1 : number + 2]
        if self.held[0] == number - 1 and not whole and ahead and not ahead[0][2]:  # it is being read sequentially
            self.file.remote.prefetch(self.file, *ahead[0][:2])
        return self.file.remote.read(self.file, start, end, keep=whole)


class Remote:
    """Fetches byte ranges of the files of one file system, on threads of its own. Thread-safe.

    Raises BadShard for a file that is gone, has changed or is not readable, UserError when the network has failed for
    `patience_seconds` without a break.
    """

    def __init__(self, fs: Any, base_dir: Path) -> None:
        self.fs, self.base_dir = fs, base_dir
        self.patience_seconds = get_network_seconds()
        self.folder = get_cache_dir(base_dir)
        self.cache = RangeCache(self.folder / "pieces", get_cache_bytes())
        self.footers = RangeCache(self.folder / "footers", FOOTER_CACHE_BYTES)
        self.pending: OrderedDict[tuple[RemoteFile, int, int], Future[bytes]] = OrderedDict()
        self.lock = threading.Lock()
        self.answered_at: float | None = None  # when the server last answered
        self.authorized = False  # something was read
        self.warned_at = 0.0
        # See RemoteFile.footer, and the ranges of a file as computed from it; of the latest files.
        self.footer = lru_cache(MAX_FOOTERS)(lambda file: self.wait(self._start(partial(self._footer, file))))
        self.ranges = lru_cache(MAX_FOOTERS)(lambda file, ranges_of: ranges_of(self.footer(file)))
        self.ahead = threading.BoundedSemaphore(FETCHES_AHEAD)

    def __reduce__(self) -> tuple[Any, ...]:  # into a worker process, which has one of its own for all files
        return _remote_of, (self.fs, self.base_dir)

    def read(self, file: RemoteFile, start: int, end: int, keep: bool = False) -> bytes:
        """Bytes start to end of a file. `keep` them in the cache on disk."""
        with self.lock:
            future = self.pending.pop((file, start, end), None)
        return self.wait(future or self._start(partial(self._cached, file, start, end, keep)))

    def prefetch(self, file: RemoteFile, start: int, end: int, keep: bool = False) -> None:
        """Start fetching what read() will need, unless that is under way."""
        key = (file, start, end)
        with self.lock:
            if key in self.pending:
                return
            self.pending[key] = self._start(partial(self._cached, file, start, end, keep), self.ahead)
            if len(self.pending) > MAX_PENDING:
                self.pending.popitem(last=False)[1].cancel()

    def fetch_footers(self, files: Sequence[RemoteFile]) -> None:
        """Fetch the footers of all files in parallel. Errors about a file are raised when it is opened."""
        for first in range(0, len(files), FETCHES_AHEAD):
            for future in [self._start(partial(self._footer, file)) for file in files[first : first + FETCHES_AHEAD]]:
                with suppress(BadShard):
                    self.wait(future)

    def wait(self, future: "Future[Result]") -> Result:
        """The future's result. Raises StopRequested if this thread is asked to stop meanwhile."""
        while not wait([future], POLL_SECONDS).done:
            raise_if_stop_requested()
        return future.result()

    def retry(self, action: Callable[[], Result], url: str) -> Result:
        """action(), repeated while the network fails. Raises as the class says; `url` is for the message."""
        began, delay = time.monotonic(), FIRST_DELAY_SECONDS
        while True:
            try:
                result = action()
                self.answered_at = time.monotonic()
                return result
            except Exception as error:
                self._raise_unless_temporary(error, began, url)
            time.sleep(delay)
            delay = min(2 * delay, MAX_DELAY_SECONDS, self._patience() / 10 + 0.01)

    def _patience(self) -> float:
        """Seconds to wait for a failing network."""
        reached = self.answered_at is not None
        return self.patience_seconds if reached else min(UNREACHED_PATIENCE_SECONDS, self.patience_seconds)

    def _raise_unless_temporary(self, error: Exception, began: float, url: str) -> None:
        """Return if another attempt may help. Errors without a break count from the last answer to any thread."""
        kind, now, patience = classify(error), time.monotonic(), self._patience()
        if kind is None:
            raise error
        if kind in ("missing", "shorter"):
            problem = "is not there (any more)" if kind == "missing" else "is shorter than when it was listed"
            raise BadShard(f"{url} {problem}", url) from error
        if kind == "denied" and not self.authorized:  # later it may be credentials that are about to be renewed
            raise UserError(f"{url}: access denied ({brief(error)}); check the address and the credentials") from error
        if now - max(began, self.answered_at or 0) > patience:
            raise UserError(
                f"{url}: no answer for {patience:g} seconds ({brief(error)}); check the network and the address, and "
                "start again"
            ) from error
        with self.lock:
            if now - self.warned_at > WARN_SECONDS:
                self.warned_at = now
                warn(f"{url}: {brief(error)}; trying again for {patience:g} seconds")

    def _cached(self, file: RemoteFile, start: int, end: int, keep: bool) -> bytes:
        fetch = partial(self._fetch, file, start, end)
        if not (keep and file.version):  # without a version the cached bytes could be old
            return fetch()
        return self.cache.get(f"{file.key}-{start}-{end}", fetch)

    def _fetch(self, file: RemoteFile, start: int, end: int) -> bytes:
        def fetch() -> bytes:
            data = self.fs.cat_file(file.path, start=start, end=end)
            if len(data) == end - start:
                self.authorized = True
                return data
            if len(data) == file.size:
                raise UserError(f"{file}: its server sends whole files only; download it and give its path")
            now = self.fs.info(file.path).get("size")
            if now != file.size:
                raise BadShard(f"{file} has changed: {now:,} bytes, {file.size:,} when it was listed", file)
            raise OSError(f"received {len(data):,} of {end - start:,} bytes")

        return self.retry(fetch, str(file))

    def _footer(self, file: RemoteFile) -> bytes:
        def fetch() -> bytes:
            tail = self._fetch(file, max(0, file.size - TAIL_BYTES), file.size)
            size = int.from_bytes(tail[-8:-4], "little") + 8 if tail[-4:] == b"PAR1" else 0
            if not len(tail) < size < file.size:
                return tail[len(tail) - size :] if size <= len(tail) else tail
            return self._fetch(file, file.size - size, file.size - len(tail)) + tail

        if not file.size:
            return b""
        return self.footers.get(file.key, fetch) if file.version else fetch()

    def _start(self, action: Callable[[], Result], slots: threading.Semaphore | None = None) -> "Future[Result]":
        """Run `action` on a daemon thread, unlike an executor's: the program's exit does not wait for a network."""
        future: Future[Result] = Future()

        def work() -> None:
            with slots or nullcontext():
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(action())
                    except BaseException as error:
                        future.set_exception(error)

        threading.Thread(target=work, name="nanochat-fetch", daemon=True).start()
        return future


@lru_cache(maxsize=16)
def _remote_of(fs: Any, base_dir: Path) -> Remote:
    return Remote(fs, base_dir)


# ---------------------------------------------------------------------------------------------------
# Listing


def find_remote(
    data: str, usable: Callable[[PurePosixPath], Any], base_dir: Path
) -> tuple[list[RemoteFile], Counter[str]]:
    """(usable files, sorted by path; how many others of each kind) of the URL of a file, a folder or a glob.

    Hidden files are not used. Raises UserError if the URL does not exist or cannot be listed.
    """
    fs, path = open_filesystem(data)
    remote = Remote(fs, base_dir)
    try:
        found, unused = remote.retry(partial(list_files, fs, path, usable), data)
    except BadShard as error:
        raise UserError(f"--data {data}: there is no such file, folder or bucket") from error
    except UserError:
        raise
    except ValueError as error:  # an invalid pattern
        raise UserError(f"--data {data}: {brief(error)}") from error
    files = [
        RemoteFile(fs.unstrip_protocol(name), info["size"], version_of(info), name, remote)
        for name, info in found.items()
        if info.get("size") is not None
    ]
    if found and not files:
        raise UserError(f"--data {data}: its server does not tell sizes; download it and give its path")
    return sorted(files), unused
