"""The step folders of a run: how a step appears all at once, and what a crash can leave behind.

    RUN/000120/          complete: it holds manifest.json, which is written last (manifest.py)
    RUN/.000120.new/     being written          RUN/.000120.old/   being replaced
    RUN/.000120.gone/    being deleted          RUN/.lock          held by the one process that writes here

A folder with a manifest is complete whatever its name, so after a crash any later process can finish the renames.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock

from nanochat.checkpoint.manifest import MANIFEST, Manifest
from nanochat.common import UserError, fsync, warn

LOCK = ".lock"
LOCK_TIMEOUT_SECONDS = 600  # for another process that is saving into the same run


# ---------------------------------------------------------------------------------------------------
# Names


def step_path(run: Path, step: int, state: str = "") -> Path:
    """`000120`, or `.000120.<state>` while it is "new", "old" or "gone"."""
    return run / (f".{step:06d}.{state}" if state else f"{step:06d}")


def list_steps(run: Path) -> list[int]:
    """The run's complete steps, ascending. Renames that a crash interrupted are finished first."""
    run = Path(run)
    if _hidden_steps(run, "new") or _hidden_steps(run, "old"):
        # Only if no living process is saving here. Without write permission, the steps that are in place count.
        with contextlib.suppress(OSError), filelock.FileLock(run / LOCK, timeout=0):
            _finish_renames(run)
    return _complete_steps(run)


def run_and_step(path: Path, step: int = -1) -> tuple[Path, int | None]:
    """(the run's folder, the step to take of it or None for the latest) for the folder of a run or of one step.

    Raises UserError for a step's folder that is not of `step`, or is not named by its step.
    """
    path = path.resolve()  # it may be "." or a link
    if not (path / MANIFEST).exists() and (list_steps(path) or not path.name.isdigit()):
        return path, None if step < 0 else step
    if not path.name.isdigit():
        raise UserError(f"{path} is a step's folder under another name; name it as its run did, such as 000120")
    if 0 <= step != int(path.name):
        raise UserError(f"{path} is step {int(path.name)}, not {step}; leave --step out, or give the run's folder")
    return path.parent, int(path.name)


def completed_ns(path: Path) -> int:
    """When a step was completed, in nanoseconds; 0 if its run is deleting it at this moment."""
    with contextlib.suppress(FileNotFoundError):
        return (path / MANIFEST).stat().st_mtime_ns
    return 0


def _complete_steps(run: Path) -> list[int]:
    names = os.listdir(run) if run.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch(r"\d{6,}", name) and (run / name / MANIFEST).exists())


def _hidden_steps(run: Path, state: str) -> list[int]:
    names = os.listdir(run) if run.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(rf"\.(\d{{6,}})\.{state}", name)))


# ---------------------------------------------------------------------------------------------------
# Appearing and disappearing


@contextlib.contextmanager
def new_step(run: Path, step: int, keep_last: int) -> Iterator[Path]:
    """Yield a folder to write step `step` into; leaving the block publishes it, an exception leaves all as it was.

    Inside the block the caller writes its files and, last, the manifest. One process at a time per run. Afterwards,
    with `keep_last` N > 0, steps older than the newest N are deleted.
    """
    _make_run_folder(run)
    with filelock.FileLock(run / LOCK, timeout=LOCK_TIMEOUT_SECONDS):
        _finish_renames(run)
        _delete_hidden(run)
        folder = step_path(run, step, "new")
        try:
            folder.mkdir()
            yield folder
            assert (folder / MANIFEST).exists(), "a step without its manifest is not complete"
            _publish(run, step)
        except BaseException:
            with contextlib.suppress(OSError):  # the original exception matters more
                _delete(folder)
            raise
        _prune(run, step, keep_last)
        _delete_hidden(run)


def _make_run_folder(run: Path) -> None:
    """Create the run's folder so that it survives a power failure."""
    missing = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync(folder.parent)


def _publish(run: Path, step: int) -> None:
    """Rename the complete `.new` folder to its final name. An earlier save of the step becomes `.old`, and comes back
    if this fails."""
    final, new, old = (step_path(run, step, state) for state in ("", "new", "old"))
    replaces = final.exists()
    if replaces:
        os.rename(final, old)
    try:
        os.rename(new, final)
        fsync(run)
    except BaseException:
        with contextlib.suppress(OSError):  # if this fails too, _finish_renames does it later
            if replaces and final.exists():
                os.rename(final, new)
            if replaces:
                os.rename(old, final)
        raise


def _finish_renames(run: Path) -> None:
    """Complete what a dead process began: publish complete `.new` folders, restore `.old` ones without a successor."""
    for step in _hidden_steps(run, "new"):
        if (step_path(run, step, "new") / MANIFEST).exists():
            if step_path(run, step).exists() and step_path(run, step, "old").exists():
                _delete(step_path(run, step, "old"))
            _publish(run, step)
    for step in _hidden_steps(run, "old"):
        if not step_path(run, step).exists():
            os.rename(step_path(run, step, "old"), step_path(run, step))


def _delete_hidden(run: Path) -> None:
    """Delete all hidden folders. One that cannot be deleted is reported and left for the next save."""
    for state in ("new", "old", "gone"):
        for step in _hidden_steps(run, state):
            try:
                _delete(step_path(run, step, state))
            except OSError as error:
                warn(f"cannot delete {step_path(run, step, state)}: {error}")


def _delete(folder: Path) -> None:
    """Delete a step's folder, its manifest first, so that a partly deleted one never counts as complete."""
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def _prune(run: Path, newest: int, keep_last: int) -> None:
    """Mark steps older than the newest N for deletion. A step with a missing or cut file does not count as kept.

    Steps beyond `newest`, of a run that was resumed from an earlier step, are never deleted.
    """
    kept = 1
    for step in reversed([step for step in _complete_steps(run) if step < newest]) if keep_last > 0 else ():
        if kept >= keep_last:
            with contextlib.suppress(OSError):  # then it stays, and is still good
                os.rename(step_path(run, step), step_path(run, step, "gone"))
        elif _has_all_files(step_path(run, step)):
            kept += 1


def _has_all_files(path: Path) -> bool:
    """Whether all of a step's files have their size; their contents are not read."""
    try:
        manifest = Manifest.read(path)
        for name in manifest.files:
            manifest.check_size(name)
    except UserError:
        return False
    return True
