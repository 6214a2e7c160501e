"""The base folder and other settings from the environment, user errors, atomic files, console output.

Imports nothing from nanochat. This package and runtime.py are the only readers of environment variables.
"""

import contextlib
import glob
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
"""In vocabulary order: their ids follow those of the merges."""


class UserError(ValueError):
    """A mistake in a command, a setting or a file. Its message is one line that names the mistake and the fix.

    Scripts print it without a traceback and exit with code 2.
    """


class BadShard(UserError):
    """A data file that is missing or damaged. `shard` is its path or URL, as in the message."""

    def __init__(self, message: str, shard: object) -> None:
        super().__init__(message)
        self.shard = str(shard)


def get_base_dir(to_write: bool = True) -> Path:
    """The folder of everything nanochat writes: $NANOCHAT_BASE_DIR, else ~/.cache/nanochat.

    To write, it is created if missing; UserError if it cannot be created or written to. To read, it is taken as it is.
    """
    try:
        path = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser().resolve()
    except RuntimeError as error:  # neither HOME nor an entry in the list of users
        raise UserError("there is no home folder to write to; set NANOCHAT_BASE_DIR to a folder") from error
    if not to_write:
        return path
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the base folder {path}: {error.strerror}; set NANOCHAT_BASE_DIR") from error
    if not is_writable(path):
        raise UserError(f"the base folder {path} is not writable; set NANOCHAT_BASE_DIR to one that is")
    return path


def is_writable(folder: Path) -> bool:
    """Whether this user may create files in a folder."""
    return os.access(folder, os.W_OK | os.X_OK)


def get_datasets_dir() -> Path | None:
    """A local mirror of Hugging Face data sets in hub layout: $NANOCHAT_DATASETS_DIR, or None."""
    return _path_from_env("NANOCHAT_DATASETS_DIR")


def get_cache_dir(base_dir: Path) -> Path:
    """The cache of data fetched from URLs: $NANOCHAT_CACHE_DIR (best on a local disk), else in the base folder."""
    return _path_from_env("NANOCHAT_CACHE_DIR") or base_dir / "stream"


def get_kernels_dir() -> Path:
    """The compiled CPU kernels: $NANOCHAT_KERNELS_DIR, else in the base folder."""
    return _path_from_env("NANOCHAT_KERNELS_DIR") or get_base_dir(to_write=False) / "kernels"


def get_cache_bytes() -> int:
    """Size limit of that cache: $NANOCHAT_CACHE_GB gigabytes, by default 20; 0 turns it off."""
    return round(1e9 * _number_from_env("NANOCHAT_CACHE_GB", 20))


def get_network_seconds() -> float:
    """How long a failing network request is retried: $NANOCHAT_NETWORK_SECONDS, by default 300."""
    return _number_from_env("NANOCHAT_NETWORK_SECONDS", 300)


def debug_enabled() -> bool:
    """NANOCHAT_DEBUG=1 shows the traceback behind one-line errors."""
    return os.environ.get("NANOCHAT_DEBUG", "") not in ("", "0")


def kernels_enabled() -> bool:
    """NANOCHAT_KERNELS=0 uses plain PyTorch on the CPU, for comparison."""
    return os.environ.get("NANOCHAT_KERNELS", "") != "0"


def openmp_sleeps() -> bool:
    """OMP_WAIT_POLICY=passive lets PyTorch's threads on a CPU give up their cores while they wait for each other."""
    return os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"


def _path_from_env(name: str) -> Path | None:
    path = os.environ.get(name)
    return Path(path).expanduser().resolve() if path else None


def _number_from_env(name: str, default: float) -> float:
    """A number from 0 to 1e12. Raises UserError for anything else."""
    text = os.environ.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e12:
        raise UserError(f"{name} must be a number, 0 or more, got {text!r}")
    return value


# ---------------------------------------------------------------------------------------------------
# Files

DAY = 86400.0  # seconds


@contextlib.contextmanager
def atomic_path(path: Path | str, durable: bool = True) -> Iterator[Path]:
    """Yield the path of a temporary neighbour to write (a file or a folder); on success rename it to `path`.

    A reader sees the old file or the new one, never a half-written one. `durable` flushes it to disk first, so that
    this also holds after a power failure. On any exception the neighbour is deleted and `path` is untouched; those of
    processes that were killed, the next writer of `path` deletes after a day.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    delete_leftovers(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"), min_age=DAY)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        if durable:
            fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
        raise


@contextlib.contextmanager
def atomic_write(path: Path | str, mode: str = "wb", durable: bool = True) -> Iterator[IO[Any]]:
    """Open a file that replaces `path` when it is closed (see atomic_path). Text modes are UTF-8."""
    encoding = None if "b" in mode else "utf-8"
    with atomic_path(path, durable) as temporary, open(temporary, mode, encoding=encoding) as file:
        yield file


def delete_leftovers(paths: Iterable[Path], min_age: float = 0.0) -> None:
    """Delete temporary files and folders of atomic_path that killed processes left.

    Only under the lock that their writers hold; where they hold none, those not touched for `min_age` seconds.
    """
    for path in list(paths):
        with contextlib.suppress(OSError):  # it stays until the next time
            if time.time() - path.stat().st_mtime >= min_age:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def free_name(path: Path, word: str) -> Path:
    """`path` with `.WORD1` appended, or the first number that is not taken yet, to move something aside to."""
    return next(p for n in itertools.count(1) if not (p := path.with_name(f"{path.name}.{word}{n}")).exists())


def fsync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, atomically."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.write("\n")


def json_hash(value: Any) -> str:
    """Hex SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_file(path: Path | str) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------
# Console

LINE_ENDS = re.compile("\r\n?|[\v\f\x85\u2028\u2029]")
# What a terminal obeys or what hides text: control characters, overrides of the direction, surrogates.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Text of a model or of data for a terminal: any line end as \\n, control characters as escapes such as \\x1b."""
    return OBEYED.sub(lambda found: repr(found[0])[1:-1], LINE_ENDS.sub("\n", text))


def on_terminal() -> bool:
    """Whether standard output is a terminal, where a progress line can be redrawn."""
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def say(text: str, end: str = "\n") -> None:
    """Print at once, for the lines of long runs, which are followed while they run."""
    print(text, end=end, flush=True)


def warn(message: str) -> None:
    """Print one warning line on standard error."""
    print(f"warning: {visible(message)}", file=sys.stderr, flush=True)


# What PyTorch's allocators on CPU and GPU, CUDA, cuBLAS (which allocates as its first handle is made), Triton and NCCL
# say, under several classes and wrapped by torch.compile; and sizes beyond any memory.
OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|allocate memory|not enough memory|size calculation overflowed|STATUS_ALLOC_FAILED|"
    r"CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate|Failed to (CUDA )?(host )?[mc]?alloc",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the device or the machine is used up.

    A kernel that needs more shared memory than a card has (Triton's OutOfResources) is none: no smaller batch helps.
    """
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}"))
    )


def first_line(error: BaseException) -> str:
    """First line of a library's or the system's error, at most 120 characters, to quote inside an error of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")[:120]


def format_seconds(seconds: float) -> str:
    """`75` -> `1m15s`."""
    seconds = round(seconds)
    hours, minutes = divmod(seconds // 60, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"


def format_count(value: float) -> str:
    """`1234567` -> `1.23M`."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"
