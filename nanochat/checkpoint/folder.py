"""One step of a run on disk: its names, how it appears all at once, its manifest, what a crash leaves behind.

    RUN/000120/          complete: it has manifest.json, with size and SHA-256 of each file, written last
    RUN/.000120.new/     being written          RUN/.000120.old/   being replaced
    RUN/.000120.gone/    being deleted          RUN/.lock          held by the one process that writes here

A folder that has its manifest is complete whatever its name, so whoever comes after a crash can finish the work.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from nanochat.common import UserError, sha256_file, warn, write_json

FORMAT, VERSION = "nanochat-checkpoint", 1
MANIFEST, LOCK = "manifest.json", ".lock"
LOCK_SECONDS = 600  # how long a save waits for another process that is saving into the same run


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not what was written. Looking for the latest good one, it is skipped."""


# ---------------------------------------------------------------------------------------------------
# Names


def written_ns(path: Path) -> int:
    """When a step was completed, in nanoseconds; 0 if its run has deleted it this very moment."""
    with contextlib.suppress(FileNotFoundError):
        return (path / MANIFEST).stat().st_mtime_ns
    return 0


def step_path(run: Path, step: int, state: str = "") -> Path:
    """`000120`, or `.000120.<state>` while it is new, old or gone."""
    return run / (f".{step:06d}.{state}" if state else f"{step:06d}")


def _complete_steps(run: Path) -> list[int]:
    names = os.listdir(run) if run.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch(r"\d{6,}", name) and (run / name / MANIFEST).exists())


def leftovers(run: Path, state: str) -> list[int]:
    """Steps that a dead process left behind as `.<step>.<state>`."""
    names = os.listdir(run) if run.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(rf"\.(\d{{6,}})\.{state}", name)))


def list_steps(run: Path) -> list[int]:
    """The run's complete steps, ascending. A swap that a crash cut in two is put right first."""
    run = Path(run)
    if leftovers(run, "new") or leftovers(run, "old"):
        # Only when no living process is saving here; in a folder that we may not write, what is there is there.
        with contextlib.suppress(OSError), filelock.FileLock(run / LOCK, timeout=0):
            _settle(run)
    return _complete_steps(run)


# ---------------------------------------------------------------------------------------------------
# Appearing and disappearing


@contextlib.contextmanager
def new_step(run: Path, step: int, keep_last: int) -> Iterator[Path]:
    """A folder to write step `step` into; leaving the block puts it in place, an exception leaves all as it was.

    Inside the block the caller writes its files and, last, `write_manifest`. One process at a time per run.
    Afterwards, with `keep_last` N > 0, steps older than the newest N are deleted.
    """
    _make_run(run)
    with filelock.FileLock(run / LOCK, timeout=LOCK_SECONDS):
        _settle(run)
        _sweep(run)
        folder = step_path(run, step, "new")
        try:
            folder.mkdir()
            yield folder
            assert (folder / MANIFEST).exists(), "a step without its manifest is not complete"
            _publish(run, step)
        except BaseException:
            with contextlib.suppress(OSError):  # the failure itself is on its way up
                _remove(folder)
            raise
        _prune(run, step, keep_last)
        _sweep(run)


def _make_run(run: Path) -> None:
    """Create the run's folder so that it outlives a power cut."""
    missing = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync(folder.parent)


def _publish(run: Path, step: int) -> None:
    """Give the complete `.new` folder its final name. One that has it already steps aside; on failure it comes back."""
    final, new, old = (step_path(run, step, state) for state in ("", "new", "old"))
    replaces = final.exists()
    if replaces:
        os.rename(final, old)
    try:
        os.rename(new, final)
        fsync(run)
    except BaseException:
        with contextlib.suppress(OSError):  # if even this fails, _settle does it later
            if replaces and final.exists():
                os.rename(final, new)
            if replaces:
                os.rename(old, final)
        raise


def _settle(run: Path) -> None:
    """Finish what a dead process began: publish complete `.new` folders, put `.old` ones back that nothing replaced."""
    for step in leftovers(run, "new"):
        if (step_path(run, step, "new") / MANIFEST).exists():
            if step_path(run, step).exists() and step_path(run, step, "old").exists():
                _remove(step_path(run, step, "old"))
            _publish(run, step)
    for step in leftovers(run, "old"):
        if not step_path(run, step).exists():
            os.rename(step_path(run, step, "old"), step_path(run, step))


def _sweep(run: Path) -> None:
    """Delete what no checkpoint needs any more. A folder that will not go is named and left for the next time."""
    for state in ("new", "old", "gone"):
        for step in leftovers(run, state):
            try:
                _remove(step_path(run, step, state))
            except OSError as error:
                warn(f"cannot delete {step_path(run, step, state)}: {error}")


def _remove(folder: Path) -> None:
    """Delete a step's folder, its manifest first, so that half of it never passes for complete."""
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def _prune(run: Path, newest: int, keep_last: int) -> None:
    """Mark steps before the newest N for deletion. Steps beyond `newest` (another future) are not ours to delete.

    A step that is plainly damaged does not count as kept.
    """
    kept = 1
    for step in reversed([step for step in _complete_steps(run) if step < newest]) if keep_last > 0 else ():
        if kept >= keep_last:
            with contextlib.suppress(OSError):  # still there means still good
                os.rename(step_path(run, step), step_path(run, step, "gone"))
        elif _is_whole(step_path(run, step)):
            kept += 1


def fsync(path: Path) -> None:
    """Push a file or a folder's entries to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------------
# Manifest


def write_manifest(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Declare a step complete. `files` maps each name to its {"sha256", "bytes"}; all are on the disk already."""
    fsync(folder)
    manifest = {"format": FORMAT, "version": VERSION, "files": files}
    write_json(folder / MANIFEST, {**manifest, "checksum": _checksum(manifest)})
    fsync(folder)


def read_manifest(path: Path) -> dict[str, Any]:
    """A step's manifest; its own checksum tells a damaged one from one of another version."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        checksum = manifest.pop("checksum")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path / MANIFEST} is missing or damaged ({error}); choose another step") from error
    if checksum != _checksum(manifest):
        raise DamagedCheckpoint(f"{path / MANIFEST} is damaged (sha256 mismatch); choose another step")
    check_version(path / MANIFEST, manifest)
    return manifest


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def check_version(path: Path, saved: dict[str, Any]) -> None:
    if saved.get("format") != FORMAT or saved.get("version") != VERSION:
        raise UserError(
            f"{path} is of format {saved.get('format')} version {saved.get('version')}, this nanochat reads "
            f"{FORMAT} version {VERSION}; use the nanochat that wrote it"
        )


def check_size(path: Path, name: str, files: dict[str, dict[str, Any]]) -> None:
    try:
        size = (path / name).stat().st_size
    except OSError as error:
        raise DamagedCheckpoint(f"{path / name} cannot be read ({error.strerror}); choose another step") from error
    if size != files[name]["bytes"]:
        raise DamagedCheckpoint(
            f"{path / name} is damaged: it has {size:,} bytes of {files[name]['bytes']:,}; choose another step"
        )


def check_hash(path: Path, name: str, files: dict[str, dict[str, Any]], found: str) -> None:
    if found != files[name]["sha256"]:
        raise DamagedCheckpoint(f"{path / name} is damaged (sha256 mismatch); choose another step")


def file_record(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


def verify_file(path: Path, name: str, files: dict[str, dict[str, Any]]) -> None:
    """Compare a file's size and hash with the manifest."""
    check_size(path, name, files)
    try:
        found = sha256_file(path / name)
    except OSError as error:
        raise DamagedCheckpoint(f"{path / name} cannot be read ({error.strerror}); choose another step") from error
    check_hash(path, name, files, found)


def _is_whole(path: Path) -> bool:
    """True if all of a step's files are there in full; their contents are not read."""
    try:
        files = read_manifest(path)["files"]
        for name in files:
            check_size(path, name, files)
    except UserError:
        return False
    return True
