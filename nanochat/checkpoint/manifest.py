"""The manifest of one step: size and SHA-256 of each of its files. A step that has its manifest is complete."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import UserError, fsync, json_hash, sha256_file, write_json

FORMAT, VERSION = "nanochat-checkpoint", 1
MANIFEST = "manifest.json"


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not what was written. The search for the latest good one skips it."""


@dataclass
class Manifest:
    """The files in `folder`: name -> {"sha256", "bytes"}. The checks raise DamagedCheckpoint, which names the file."""

    folder: Path
    files: dict[str, dict[str, Any]]
    step: int | None = None  # None in manifests written before they had it

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of the step that `folder` is named after.

        Its own checksum tells a damaged one (DamagedCheckpoint) from another version's (UserError).
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_bytes())
            checksum = content.pop("checksum")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedCheckpoint(f"{path} is missing or damaged ({error}); choose another step") from error
        if checksum != json_hash(content):
            raise DamagedCheckpoint(f"{path} is damaged (sha256 mismatch); choose another step")
        check_version(path, content)
        check_step(folder, content.get("step"))
        return cls(folder, content["files"], content.get("step"))

    def write(self) -> None:
        """Declare the step complete. All its files are on the disk already."""
        fsync(self.folder)
        content = {"format": FORMAT, "version": VERSION, "step": self.step, "files": self.files}
        write_json(self.folder / MANIFEST, {**content, "checksum": json_hash(content)})
        fsync(self.folder)

    def check_size(self, name: str) -> None:
        """Compare a file's size with the record."""
        path, expected = self.folder / name, self.files[name]["bytes"]
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror}); choose another step") from error
        if size != expected:
            raise DamagedCheckpoint(f"{path} is damaged: it has {size:,} bytes of {expected:,}; choose another step")

    def check_hash(self, name: str, sha256: str | None = None) -> None:
        """Compare a file's SHA-256, `sha256` if it is known already, with the record."""
        path = self.folder / name
        try:
            sha256 = sha256 or sha256_file(path)
        except OSError as error:
            raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror}); choose another step") from error
        if sha256 != self.files[name]["sha256"]:
            raise DamagedCheckpoint(f"{path} is damaged (sha256 mismatch); choose another step")


def check_version(path: Path, content: dict[str, Any]) -> None:
    """Raise UserError if `content`, read from `path`, was written by another version of this format."""
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise UserError(
            f"{path} is of format {content.get('format')} version {content.get('version')}, this nanochat reads "
            f"{FORMAT} version {VERSION}; use the nanochat that wrote it"
        )


def check_step(folder: Path, step: int | None) -> None:
    """Raise DamagedCheckpoint if `folder` is not named after `step`, which its files were saved as."""
    if step is not None and folder.name != f"{step:06d}":
        raise DamagedCheckpoint(
            f"{folder} holds the files of step {step}: it was copied or renamed; choose another step, or name the "
            f"folder {step:06d} if that one is missing"
        )


def file_record(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}
