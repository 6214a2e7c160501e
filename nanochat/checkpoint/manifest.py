"""The manifest of one step: size and SHA-256 of each of its files. A step that has its manifest is complete."""

import contextlib
import hashlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import NonNegativeInt, StringConstraints
from typing_extensions import TypedDict

from nanochat.common import UserError, fsync, json_hash, sha256_file, write_json
from nanochat.common.files import JSON_BYTES, check_value, open_file, read_json
from nanochat.reporting.machine import memory_bytes

FORMAT, VERSION = "nanochat-checkpoint", 1
MANIFEST = "manifest.json"

PlainName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=255)]


Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class FileRecord(TypedDict):
    sha256: Sha256
    bytes: NonNegativeInt


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not what was written. The search for the latest good one skips it."""


class Content(TypedDict):
    """The manifest's own fields, beside format, version and checksum."""

    files: dict[PlainName, FileRecord]
    step: NotRequired[int | None]


@contextlib.contextmanager
def damaged() -> Iterator[None]:
    """Turn a UserError of the block, which reads a checkpoint's file, into a DamagedCheckpoint."""
    try:
        yield
    except UserError as error:
        raise DamagedCheckpoint(f"{error}; choose another step") from error


@dataclass
class Manifest:
    """The files in `folder`: plain names of regular files. The checks raise DamagedCheckpoint, which names the file."""

    folder: Path
    files: dict[str, FileRecord]
    step: int | None = None  # None in manifests written before they had it

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of the step that `folder` is named after.

        Its own checksum tells a damaged one (DamagedCheckpoint) from another version's (UserError).
        """
        path = folder / MANIFEST
        with damaged():
            content = read_json(path, dict[str, Any], follow_links=False)
            if content.pop("checksum", None) != json_hash(content):
                raise UserError(f"{path} is damaged (sha256 mismatch)")
        if content.get("format") != FORMAT or content.get("version") != VERSION:
            raise UserError(
                f"{path} is of format {content.get('format')!r:.40} version {content.get('version')!r:.40}, this "
                f"nanochat reads {FORMAT} version {VERSION}; use the nanochat that wrote it"
            )
        with damaged():
            content = check_value(content, path, Content)
        check_step(folder, content.get("step"))
        return cls(folder, content["files"], content.get("step"))

    def write(self) -> None:
        """Declare the step complete. All its files are on the disk already."""
        fsync(self.folder)
        content = {"format": FORMAT, "version": VERSION, "step": self.step, "files": self.files}
        write_json(self.folder / MANIFEST, {**content, "checksum": json_hash(content)})
        fsync(self.folder)

    def check_size(self, name: str) -> None:
        """Compare a file's size with the record, and with what there can be memory for, before it is read."""
        path, expected = self.folder / name, self.files[name]["bytes"]
        try:
            found = path.lstat()
        except OSError as error:
            raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror}); choose another step") from error
        if not stat.S_ISREG(found.st_mode):
            raise DamagedCheckpoint(f"{path} is not a regular file; choose another step, or replace it by a copy")
        if found.st_size != expected:
            size = found.st_size
            raise DamagedCheckpoint(f"{path} is damaged: it has {size:,} bytes of {expected:,}; choose another step")
        limit = JSON_BYTES if path.suffix == ".json" else memory_bytes()
        if found.st_size > limit:
            raise UserError(f"{path} has {found.st_size:,} bytes, of which there is room for {limit:,}")

    def check_hash(self, name: str, sha256: str | None = None) -> None:
        """Compare a file's SHA-256, `sha256` if it is known already, with the record."""
        path = self.folder / name
        if sha256 is None:
            with damaged(), open_file(path, follow_links=False) as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != self.files[name]["sha256"]:
            raise DamagedCheckpoint(f"{path} is damaged (sha256 mismatch); choose another step")


def check_step(folder: Path, step: int | None) -> None:
    """Raise DamagedCheckpoint if `folder` is not named after `step`, which its files were saved as."""
    if step is not None and folder.name != f"{step:06d}":
        raise DamagedCheckpoint(
            f"{folder} holds the files of step {step}: it was copied or renamed; choose another step, or name the "
            f"folder {step:06d} if that one is missing"
        )


def file_record(path: Path) -> FileRecord:
    """A file's entry in the manifest."""
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}
