"""Download the shards of public data sets from the Hugging Face hub.

A shard is about a hundred megabytes and a network fails in many ways, so each is downloaded under a lock (several
processes may want it), to a hidden partial file that a later attempt or run continues, compared with the size and
SHA-256 that the hub states, opened, and only then renamed: a file under a shard's name is complete. hf_hub_download
does not do that: its partial files are named at random, so a killed process's bytes are lost, and it does not compare
hashes.
"""

import hashlib
import os
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub  # imports its parts when they are used
from filelock import FileLock, Timeout

from nanochat.common import UserError, first_line, sha256_file, warn
from nanochat.data.parquet import open_parquet

MAX_DELAY_SECONDS = 60.0
STALL_SECONDS = 30.0  # without a byte, after which a connection counts as dead
LOCK_POLL_SECONDS = 0.2
UNREACHED_ATTEMPTS = 3  # until the hub has answered once


@dataclass(frozen=True)
class HubSet:
    """A public data set: parquet shards with a column `text`, the last one for validation."""

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
        """The command that downloads some of it."""
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
    """The folder of a public set's shards."""
    return base_dir / "base_data" / name


class BadDownload(Exception):
    """The file that arrived is not the one requested; another attempt may help."""


class Stopped(Exception):
    """Another worker has failed, or the user has interrupted."""


@dataclass
class Downloader:
    """Fetches files of one set into a folder. Gives up after `attempts` in a row without progress."""

    hub: HubSet
    folder: Path
    endpoint: str | None = None  # None: HF_ENDPOINT, else https://huggingface.co
    attempts: int = 6
    delay_seconds: float = 1.0  # doubled after each failure
    stop: threading.Event = field(default_factory=threading.Event)
    reached: bool = False  # the hub has answered once

    def fetch(self, name: str) -> None:
        """Make sure the complete file `name` is in the folder. A UserError stops the other workers too."""
        target, locks = self.folder / name, self.folder / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        try:
            self.pause(0)
            # Another thread or process may be downloading it: then there is nothing left to do.
            with FileLock(locks / f"{name}.lock").acquire(None, LOCK_POLL_SECONDS, cancel_check=self.stop.is_set):
                if not self.is_complete(target):
                    self.download(target)
        except Timeout as error:  # cancelled
            raise Stopped from error
        except BaseException:
            self.stop.set()
            raise

    def pause(self, seconds: float) -> None:
        """Sleep; raises Stopped at once when the workers are to stop."""
        if self.stop.wait(seconds):
            raise Stopped

    def is_complete(self, target: Path) -> bool:
        """True if the shard is there. One that does not open (a disk may lie) is deleted."""
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
        """Attempt until done, with growing delays; the count of failures restarts whenever bytes arrived."""
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

        failures, max_bytes = 0, 0
        began = time.monotonic()
        while True:
            try:
                size = self.attempt(target)
                print(f"{target.name}: {size / 1e6:,.1f} MB in {time.monotonic() - began:.1f} s", flush=True)
                return
            except OfflineModeIsEnabled as error:
                raise UserError("HF_HUB_OFFLINE is set: unset it to download, or use --data starter") from error
            except (HTTPError, BadDownload) as error:
                before, max_bytes = max_bytes, max(max_bytes, self.partial_bytes(target))
                failures = 1 if max_bytes > before else failures + 1
                limit = self.attempts if self.reached else min(UNREACHED_ATTEMPTS, self.attempts)
                if failures >= limit or not is_temporary(error):
                    raise UserError(self.explain(target.name, error)) from error
                delay = min(MAX_DELAY_SECONDS, self.delay_seconds * 2 ** (failures - 1)) * random.uniform(0.75, 1.25)
                warn(f"{target.name}: {brief(error)}; next attempt in {delay:.1f} s")
            self.pause(delay)

    def partial_bytes(self, target: Path) -> int:
        """Bytes of the file that have arrived."""
        return max((partial.stat().st_size for partial in target.parent.glob(f".{target.name}.*.part")), default=0)

    def attempt(self, target: Path) -> int:
        """Ask for the file's size and hash, fetch what is missing, check it, rename it. Returns its size in bytes."""
        url = huggingface_hub.hf_hub_url(self.hub.repo_id, target.name, repo_type="dataset", endpoint=self.endpoint)
        remote = huggingface_hub.get_hf_file_metadata(url, timeout=STALL_SECONDS, endpoint=self.endpoint)
        self.reached = True
        etag = remote.etag or ""
        # The partial file is named after the content: one of an older version is not continued.
        partial = target.with_name(f".{target.name}.{hashlib.sha256(etag.encode()).hexdigest()[:12]}.part")
        for other in target.parent.glob(f".{target.name}.*.part"):
            if other != partial:
                other.unlink()
        have = partial.stat().st_size if partial.exists() else 0
        if remote.size is None or have < remote.size:
            self.append_body(url, partial, have)
        self.check(partial, remote.size, etag)
        size = partial.stat().st_size
        os.replace(partial, target)
        return size

    def append_body(self, url: str, partial: Path, have: int) -> None:
        """Continue the partial file after its `have` bytes; start it over if the server does not support ranges."""
        headers = huggingface_hub.utils.build_hf_headers() | {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        request: dict[str, Any] = {"headers": headers, "timeout": STALL_SECONDS, "follow_redirects": True}
        with huggingface_hub.get_session().stream("GET", url, **request) as response:
            response.raise_for_status()
            continues = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            with open(partial, "ab" if response.status_code == 206 and continues else "wb") as file:
                for chunk in response.iter_raw():
                    file.write(chunk)
                    self.pause(0)
                file.flush()
                os.fsync(file.fileno())

    def check(self, partial: Path, size: int | None, etag: str) -> None:
        """Compare with what the hub states. A partial file that is too short is kept, a wrong one deleted."""
        have = partial.stat().st_size
        if size is not None and have < size:
            raise BadDownload(f"the connection ended after {have:,} of {size:,} bytes")
        try:
            if size is not None and have > size:
                raise BadDownload(f"received {have:,} bytes instead of {size:,}")
            if re.fullmatch("[0-9a-f]{64}", etag) and sha256_file(partial) != etag:  # large files: etag is their hash
                raise BadDownload("its SHA-256 is not the one the hub states")
            try:
                open_parquet(partial).close()
            except UserError as error:
                raise BadDownload("what arrived is not a parquet file") from error
        except BadDownload:
            partial.unlink()
            raise

    def explain(self, name: str, error: Exception) -> str:
        """One line for the user: what failed, and the fix."""
        host = urlsplit(self.endpoint or huggingface_hub.constants.ENDPOINT).netloc or self.endpoint
        status = status_of(error)
        if status in (401, 403):
            return f"{host} does not give out {self.hub.repo_id} ({status}); log in with: hf auth login"
        if status == 404:
            return f"{host} has no file {name} in {self.hub.repo_id} (404); is the endpoint right?"
        if status or isinstance(error, BadDownload):
            return f"{host} failed to deliver {name} ({brief(error)}); run the command again later; it continues"
        return f"cannot reach {host} ({brief(error)}); check the network, or work offline with --data starter"


def status_of(error: Exception) -> int | None:
    """The HTTP status of an error, or None if there was no response."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_temporary(error: Exception) -> bool:
    """True if another attempt may help: no response, a broken one, too many requests, an error of the server."""
    status = status_of(error)
    return status is None or status in (408, 425, 429) or status >= 500


def brief(error: Exception) -> str:
    """The status, or the error's first line, at most 120 characters."""
    status = status_of(error)
    return f"HTTP {status}" if status else first_line(error)


def download_shards(hub: HubSet, num_files: int, base_dir: Path, workers: int = 4, **settings: Any) -> list[Path]:
    """Download the first `num_files` training shards and the validation shard; returns their paths.

    The validation shard comes first, alone: without it the set is of no use, and an unreachable hub is reported once.
    `settings` go to Downloader. Raises UserError.
    """
    downloader = Downloader(hub, hub_folder(hub.name, base_dir), **settings)
    names = [hub.val_name] + [hub.shard_name(i) for i in range(num_files)]
    downloader.fetch(names[0])
    pool = ThreadPoolExecutor(workers)
    try:
        futures = [pool.submit(downloader.fetch, name) for name in names[1:]]
        errors = [error for future in as_completed(futures) if (error := future.exception())]
    finally:
        downloader.stop.set()
        pool.shutdown(cancel_futures=True)
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):  # the cause first
        raise error
    return [downloader.folder / name for name in names]
