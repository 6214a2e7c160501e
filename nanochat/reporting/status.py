"""Whether a stage that the report calls running is still being trained, and how far it is."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from nanochat.reporting.curves import Record

# Without a lock to ask, a run that wrote nothing for so long counts as dead. Steps and evaluations are rarely longer.
SILENCE_SECONDS = 600.0


@dataclass(frozen=True)
class Status:
    """The state of a stage that has not finished."""

    alive: bool
    silent_seconds: float  # since the last sign of it: a line of metrics.jsonl, an update of report.json
    step: int | None = None  # the last in metrics.jsonl
    saved_step: int | None = None  # of its last checkpoint

    @property
    def hangs(self) -> bool:
        """A process holds the run's folder and has written nothing for long."""
        return self.alive and self.silent_seconds > SILENCE_SECONDS


def run_lock(folder: Path) -> FileLock:
    """The lock that a training process holds from its start to its end, however it ends; beside the run's folder, which
    may be moved. Waits a second, as long as a reader may hold it."""
    return FileLock(folder.parent / f".{folder.name}.lock", timeout=1)


def is_held(folder: Path) -> bool | None:
    """Whether a process trains in the folder; None if that cannot be found out, as on a read-only disk."""
    lock = run_lock(folder)
    if not Path(lock.lock_file).exists():
        return False
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return None


def status_of(values: Record, lines: Sequence[Record], base_dir: Path) -> Status | None:
    """The status of a stage, given its values and the lines of its metrics.jsonl; None unless recorded as running."""
    if values.get("status") != "running":
        return None
    heard, held, saved = seconds_of(values.get("updated_at")), None, []
    if values.get("metrics"):
        path = base_dir / values["metrics"]
        heard = max(heard, path.stat().st_mtime if path.is_file() else 0.0)
        held = is_held(path.parent)
        saved = [int(found.parent.name) for found in path.parent.glob("[0-9]*/meta.json")]
    silent = max(0.0, time.time() - heard)
    alive = silent < SILENCE_SECONDS if held is None else held
    return Status(alive, silent, lines[-1]["step"] if lines else values.get("steps"), max(saved, default=None))


def seconds_of(stamp: str | None) -> float:
    """An ISO time as seconds since 1970; 0 if there is none."""
    try:
        return datetime.fromisoformat(stamp or "").timestamp()
    except ValueError:
        return 0.0
