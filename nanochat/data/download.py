"""The public data sets on the Hugging Face hub, and fetching their shards.

A shard is worth hundreds of megabytes and a network fails in many ways, so each is downloaded under a lock
(several processes may ask at once), to a hidden neighbour that a later attempt or run continues, compared
with the size and SHA-256 that the hub states, opened, and only then renamed. What stands under a shard's
name is whole. The hub library's own download does not take up a dead process's work, nor compare hashes.
"""

import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from nanochat.common import UserError, sha256_file, warn
from nanochat.data.textfiles import open_parquet

MAX_DELAY_SECONDS = 60.0
STALL_SECONDS = 30.0  # without a byte, and the connection counts as dead


@dataclass(frozen=True)
class HubSet:
    """A public set: parquet shards with a column `text`, of which the last is for validation."""

    name: str
    repo_id: str
    last_shard: int

    def shard_name(self, index: int) -> str:
        """File name of a shard, here and on the hub."""
        return f"shard_{index:05d}.parquet"

    @property
    def val_name(self) -> str:
        """File name of the validation shard."""
        return self.shard_name(self.last_shard)

    @property
    def command(self) -> str:
        """What to type to have some of it."""
        return "python -m nanochat.dataset -n 8" + ("" if self.name == DEFAULT_SET else f" --set {self.name}")


DEFAULT_SET = "fineweb-edu"
HUB_SETS = {
    hub.name: hub
    for hub in (
        HubSet("fineweb-edu", "karpathy/fineweb-edu-100b-shuffle", 1822),
        HubSet("climbmix", "karpathy/climbmix-400b-shuffle", 6542),
    )
}


def hub_folder(name: str, base_dir: Path) -> Path:
    """Where shards of a public set are kept."""
    return base_dir / "base_data" / name


class TryAgain(Exception):
    """What arrived is not what was asked for; another attempt may do better."""


class Stopped(Exception):
    """Another worker has failed, or the person has interrupted."""


@dataclass
class Downloader:
    """Fetches files of one set into a folder. `attempts` in a row without progress are one too many."""

    hub: HubSet
    folder: Path
    endpoint: str | None = None  # None: the library's, https://huggingface.co unless HF_ENDPOINT says otherwise
    attempts: int = 6
    delay_seconds: float = 1.0  # doubled after each failure
    stop: threading.Event = field(default_factory=threading.Event)
    reached: bool = False  # the hub has answered once; until then patience is short

    def fetch(self, name: str) -> None:
        """Have the file `name` whole in the folder. UserError if that cannot be had; it stops other workers too."""
        target = self.folder / name
        try:
            with self.lock(name):
                if not self.is_whole(target):
                    self.download(target)
        except BaseException:
            self.stop.set()
            raise

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Wait while someone else, in this process or another, works on the file: their work will be ours."""
        lock = FileLock(self.folder / ".locks" / f"{name}.lock")
        (self.folder / ".locks").mkdir(parents=True, exist_ok=True)
        while not lock.is_locked:
            self.pause(0)
            with suppress(Timeout):
                lock.acquire(timeout=1)
        try:
            yield
        finally:
            lock.release()

    def pause(self, seconds: float) -> None:
        """Sleep, but leave at once when all are told to stop."""
        if self.stop.wait(seconds):
            raise Stopped

    def is_whole(self, target: Path) -> bool:
        """True if the shard is there. One that does not open (a disk may lie) is removed."""
        if not target.exists():
            return False
        try:
            open_parquet(target).close()
            return True
        except UserError as error:
            warn(f"{error}: downloading it again")
            target.unlink()
            return False

    def download(self, target: Path) -> None:
        """Attempt until done; wait longer after each failure, and begin anew with patience when bytes came."""
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

        failures, most = 0, 0
        began = time.monotonic()
        while True:
            try:
                size = self.attempt(target)
                print(f"{target.name}: {size / 1e6:,.1f} MB in {time.monotonic() - began:.1f} s", flush=True)
                return
            except OfflineModeIsEnabled as error:
                raise UserError("HF_HUB_OFFLINE is set: unset it to download, or use --data starter") from error
            except (HTTPError, TryAgain) as error:
                had, most = most, max(most, self.partial_bytes(target))
                failures = 1 if most > had else failures + 1
                limit = self.attempts if self.reached else min(3, self.attempts)
                if failures >= limit or not is_temporary(error):
                    raise UserError(self.explain(target.name, error)) from error
                delay = min(MAX_DELAY_SECONDS, self.delay_seconds * 2 ** (failures - 1)) * random.uniform(0.75, 1.25)
                warn(f"{target.name}: {brief(error)}; next attempt in {delay:.1f} s")
            self.pause(delay)

    def partial_bytes(self, target: Path) -> int:
        """How much of the file has arrived."""
        return max((part.stat().st_size for part in target.parent.glob(f".{target.name}.*.part")), default=0)

    def attempt(self, target: Path) -> int:
        """One try: ask what the file is, fetch what is missing, check it, put it in place. Its size in bytes."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self.hub.repo_id, target.name, repo_type="dataset", endpoint=self.endpoint)
        remote = get_hf_file_metadata(url, timeout=STALL_SECONDS, endpoint=self.endpoint)
        self.reached = True
        etag = remote.etag or ""
        # The part is named after the content: what was begun of an older version is not continued.
        part = target.with_name(f".{target.name}.{hashlib.sha256(etag.encode()).hexdigest()[:12]}.part")
        for other in target.parent.glob(f".{target.name}.*.part"):
            if other != part:
                other.unlink()
        if remote.size is None or not part.exists() or part.stat().st_size != remote.size:
            self.append_body(url, part)
        self.check(part, remote.size, etag)
        size = part.stat().st_size
        os.replace(part, target)
        return size

    def append_body(self, url: str, part: Path) -> None:
        """Continue `part` where it ends, or begin it if the server does not do ranges."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers

        have = part.stat().st_size if part.exists() else 0
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        request: dict[str, Any] = {"headers": headers, "timeout": STALL_SECONDS, "follow_redirects": True}
        with get_session().stream("GET", url, **request) as response:
            if response.status_code == 416:  # there is nothing after `have`: the part is too long
                part.unlink()
                raise TryAgain("the part on disk does not fit the file")
            response.raise_for_status()
            goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            with open(part, "ab" if response.status_code == 206 and goes_on else "wb") as file:
                for chunk in response.iter_raw():
                    file.write(chunk)
                    self.pause(0)
                file.flush()
                os.fsync(file.fileno())

    def check(self, part: Path, size: int | None, etag: str) -> None:
        """Compare with what the hub states. A part that is too short is kept to go on from, a wrong one not."""
        have = part.stat().st_size
        if size is not None and have < size:
            raise TryAgain(f"the connection ended after {have:,} of {size:,} bytes")
        try:
            if size is not None and have > size:
                raise TryAgain(f"received {have:,} bytes instead of {size:,}")
            if re.fullmatch("[0-9a-f]{64}", etag) and sha256_file(part) != etag:  # large files: etag is their hash
                raise TryAgain("its SHA-256 is not the one the hub states")
            try:
                open_parquet(part).close()
            except UserError as error:
                raise TryAgain("what arrived is not a parquet file") from error
        except TryAgain:
            part.unlink()
            raise

    def explain(self, name: str, error: Exception) -> str:
        """One line for the person: what failed, and what to do."""
        from huggingface_hub import constants

        host = urlsplit(self.endpoint or constants.ENDPOINT).netloc or self.endpoint
        status = status_of(error)
        if status in (401, 403):
            return f"{host} does not give out {self.hub.repo_id} ({status}); log in with: hf auth login"
        if status == 404:
            return f"{host} has no file {name} in {self.hub.repo_id} (404); is the endpoint right?"
        if status or isinstance(error, TryAgain):
            return f"{host} failed to deliver {name} ({brief(error)}); run the command again later, it continues"
        return f"cannot reach {host} ({brief(error)}); check the network, or work offline with --data starter"


def status_of(error: Exception) -> int | None:
    """The HTTP status an error reports, or None if no answer came."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_temporary(error: Exception) -> bool:
    """True if time may heal it: no answer, a broken one, too many requests, the server's own failure."""
    status = status_of(error)
    return status is None or status in (408, 425, 429) or status >= 500


def brief(error: Exception) -> str:
    """The error's first line, without addresses."""
    status = status_of(error)
    words = f"HTTP {status}" if status else str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    return words[:120]


def download_shards(hub: HubSet, num_files: int, base_dir: Path, workers: int = 4, **settings: Any) -> list[Path]:
    """Have the first `num_files` training shards and the validation shard on disk; their paths.

    The validation shard comes first, alone: without it the set is of no use, and a hub out of reach is told
    once. `settings` go to Downloader. Raises UserError.
    """
    loader = Downloader(hub, hub_folder(hub.name, base_dir), **settings)
    names = [hub.val_name] + [hub.shard_name(i) for i in range(num_files)]
    loader.fetch(names[0])
    pool = ThreadPoolExecutor(workers)
    try:
        futures = [pool.submit(loader.fetch, name) for name in names[1:]]
        errors = [error for future in as_completed(futures) if (error := future.exception())]
    finally:
        loader.stop.set()
        pool.shutdown(cancel_futures=True)
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):  # the cause, not the consequences
        raise error
    return [loader.folder / name for name in names]
