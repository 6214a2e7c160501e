"""The sandbox's three levels, seen from outside: how each is started, and which of them this machine has.

bubblewrap: namespaces of its own for users, processes, network, IPC and mounts. landlock: for machines that permit
no namespaces, such as most rented containers. unsafe: resource limits alone, for who asks for it by name.
All but the last add a filter of system calls (nanochat/sandbox_lock.py). Linux has the first two, others none.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat.common import UserError, say
from nanochat.sandbox_wire import Gone, read_frame, write_frame

SAFE_LEVELS = ("bubblewrap", "landlock")
LEVELS = (*SAFE_LEVELS, "unsafe")
START_SECONDS = 30.0
SCRATCH_BYTES = 32 << 20
NOBODY = 65534
INSIDE_UID = 1000  # what an unprivileged user looks like to itself in the namespace
# All that is read inside:
MODULES = (
    "sandbox_child",
    "sandbox_lock",
    "sandbox_processes",
    "sandbox_program",
    "sandbox_wire",
)
SYSTEM = ("/usr/lib", "/usr/lib64", "/usr/lib32", "/lib", "/lib64")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
MORE = ("/etc/ld.so.cache", "/usr/share/zoneinfo")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
BOOT = "import sys; sys.path.insert(0, {!r}); from nanochat.sandbox_child import main; del sys.path[0]; main()"
PYTHON_FLAGS = ("-s", "-S", "-P", "-B", "-X", "utf8")  # no site-packages, no caches written
HOW = "install bubblewrap (apt install bubblewrap), or ask for the unsafe level by name"


class Unavailable(Exception):
    """This machine does not have the level; says why."""


@dataclass
class Start:
    """How a supervisor is started: its command line, its settings, what it inherits and what goes with it."""

    command: list[str]
    settings: dict[str, Any]
    user: int | None = None
    fds: list[int] = field(default_factory=list)
    folder: str = ""


def python_files() -> tuple[str, list[str]]:
    """(the interpreter, everything of it that is to be readable inside). Without packages that were installed."""
    executable = os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)
    library = str(Path(sys.base_prefix).resolve() / "lib")
    covered = any(Path(library).is_relative_to(folder) for folder in SYSTEM)
    return executable, [executable] if covered else [executable, library]


def open_to_all(path: str) -> bool:
    """Whether every user may read it, judged by the folders on the way."""
    folders = Path(path).resolve().parents
    return all(folder.stat().st_mode & 0o001 for folder in folders) and bool(Path(path).stat().st_mode & 0o004)


def start_bubblewrap() -> Start:
    bwrap = shutil.which("bwrap")
    if not bwrap:
        raise Unavailable("bubblewrap is not installed")
    executable, files = python_files()
    root = os.geteuid() == 0 and unused_uid() > 0
    settings = {"level": "bubblewrap", "uid": 0, "may_read": False, "readable": [], "scratch": "/tmp"}
    start = Start([], settings, NOBODY if root else None)
    sources = {path: path for path in files}
    before: list[str] = []
    if root and not all(map(open_to_all, files)):
        # Root is exempt from limits on processes, so root turns into nobody first. What nobody may not read is
        # shown to it in another place before.
        sources = {path: f"/tmp/{i}" for i, path in enumerate(files)}
        setpriv = shutil.which("setpriv")
        if not setpriv:
            raise Unavailable("Python lies where only root may read, and setpriv is not installed")
        before = [bwrap, "--dev-bind", "/", "/", "--tmpfs", "/tmp", "--perms", "0755", "--dir", "/tmp",
                  *(word for path in files for word in ("--ro-bind", path, sources[path])),
                  setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]  # fmt: skip
        start.user = None
    start.command = [*before, bwrap, *namespaces(bwrap), *mounts(sources), *modules(start), "--remount-ro", "/",
                     "--chdir", "/tmp", "--", executable, *PYTHON_FLAGS, "-c", BOOT.format("/sandbox")]  # fmt: skip
    return start


def namespaces(bwrap: str) -> list[str]:
    version = re.search(r"(\d+)\.(\d+)", subprocess.run([bwrap, "--version"], capture_output=True, text=True).stdout)
    nested = ["--disable-userns"] if version and (int(version[1]), int(version[2])) >= (0, 8) else []
    return ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts",
            "--unshare-cgroup-try", *nested, "--uid", str(INSIDE_UID), "--gid", str(INSIDE_UID), "--cap-drop", "ALL",
            "--hostname", "sandbox", "--new-session"]  # fmt: skip


def mounts(sources: dict[str, str]) -> list[str]:
    """The file system: the system's libraries and Python read-only, three devices, a sized folder in memory.

    No /proc, nothing of the user's. `sources`: where to find the files of Python.
    """
    words: list[str] = []
    for folder in SYSTEM:
        if os.path.islink(folder):
            words += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            words += ["--ro-bind", folder, folder]
    for path, source in sources.items():
        words += ["--ro-bind", source, path]
    packages = (f"{sysconfig.get_path('stdlib')}/site-packages", "/usr/lib/python3/dist-packages")
    for folder in filter(os.path.isdir, packages):
        words += ["--tmpfs", folder, "--remount-ro", folder]
    for path in DEVICES:
        words += ["--dev-bind", path, path]
    for path in MORE:
        words += ["--ro-bind-try", path, path]
    return [*words, "--size", str(SCRATCH_BYTES), "--tmpfs", "/tmp"]


def modules(start: Start) -> list[str]:
    """This package's files that are read inside, as copies: the folder they lie in may be nobody else's business."""
    words: list[str] = []
    for name in MODULES:
        reader, writer = os.pipe()
        start.fds.append(reader)
        with open(writer, "wb") as pipe:
            pipe.write((Path(__file__).parent / f"{name}.py").read_bytes())  # they fit a pipe's 64 KiB
        words += ["--ro-bind-data", str(reader), f"/sandbox/nanochat/{name}.py"]
    return words


def start_landlock() -> Start:
    if sys.platform != "linux":
        raise Unavailable("Landlock is Linux")
    executable, files = python_files()
    uid = unused_uid() if os.geteuid() == 0 else 0
    settings = {"level": "landlock", "uid": uid, "may_read": uid > 0 and not all(map(open_to_all, files)),
                "readable": [*SYSTEM, *files, *DEVICES, *MORE], "scratch": ""}  # fmt: skip
    return Start(plain_command(executable), settings)


def unused_uid() -> int:
    """A user id that nobody has, so that limits count this sandbox's threads only; 0 where root cannot turn into it:
    there is no other in this namespace, or the rights to do so were dropped."""
    rights = int(Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0], 16)
    if ~rights & (1 << 6 | 1 << 7):  # CAP_SETGID, CAP_SETUID
        return 0
    ranges = [list(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    last = max(first + count for first, _, count in ranges) - 2
    return max(0, min(last, 1_500_000_000 + os.getpid()))


def start_unsafe() -> Start:
    if not hasattr(os, "fork"):
        raise Unavailable("running programs needs fork, which this system has not")
    folder = tempfile.mkdtemp(prefix="nanochat-unsafe-")
    settings = {"level": "unsafe", "uid": 0, "may_read": False, "readable": [], "scratch": folder}
    return Start(plain_command(python_files()[0]), settings, folder=folder)


def plain_command(executable: str) -> list[str]:
    return [executable, *PYTHON_FLAGS, "-c", BOOT.format(str(Path(__file__).resolve().parent.parent))]


STARTS = {"bubblewrap": start_bubblewrap, "landlock": start_landlock, "unsafe": start_unsafe}


class Worker:
    """A supervisor in its sandbox, and the two pipes to it. One job at a time."""

    def __init__(self, level: str) -> None:
        """Raises Unavailable if it does not come up."""
        start = STARTS[level]()
        self.level, self.folder = level, start.folder
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the worker
        who: dict[str, Any] = {} if start.user is None else {"user": start.user, "group": start.user,
                                                             "extra_groups": []}  # fmt: skip
        try:
            # A session of its own: Ctrl-C in the terminal is not for it.
            self.process = subprocess.Popen(start.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                                            stderr=self.complaints, env=ENVIRONMENT, pass_fds=start.fds,
                                            cwd="/", start_new_session=True, **who)  # fmt: skip
        except OSError as error:
            raise Unavailable(str(error)) from error
        finally:
            for fd in start.fds:
                os.close(fd)
        assert self.process.stdin and self.process.stdout
        self.requests, self.answers = self.process.stdin, self.process.stdout
        try:
            self.send(start.settings)
            self.receive(START_SECONDS)
        except BaseException as error:
            complaint = self.complaint()
            self.close()
            if isinstance(error, Gone | TimeoutError):
                raise Unavailable(complaint or "it did not start") from error
            raise

    def send(self, value: Any) -> None:
        write_frame(self.requests.fileno(), value)

    def receive(self, seconds: float) -> Any:
        return read_frame(self.answers.fileno(), time.monotonic() + seconds)

    def complaint(self) -> str:
        """The last line it wrote to its standard error."""
        self.complaints.seek(0)
        lines = self.complaints.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1].removeprefix("nanochat.sandbox_lock.Unsupported: ") if lines else ""

    def forget(self) -> None:
        """In a fork of this process: it is the other's. Its pipes must not be held open here."""
        self.complaints.close()
        self.requests.close()
        self.answers.close()

    def close(self) -> None:
        """End it and everything in it."""
        self.forget()  # it ends when its pipes do
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------
# Which level

_found: dict[str, str] = {}  # reasons why a level is not there; "" if it is
_announced: set[str] = set()
_lock = threading.Lock()


def why_unavailable(level: str) -> str:
    """Why this machine does not have the level, "" if it has. Tried out once."""
    with _lock:
        if level not in _found:
            try:
                _found[level] = try_out(level)
            except Unavailable as error:
                _found[level] = str(error) or "it did not start"
        return _found[level]


def try_out(level: str) -> str:
    """Run an empty program."""
    worker = Worker(level)
    try:
        limits = {"timeout": 10, "cpu_seconds": 10, "memory_bytes": 1 << 29, "file_bytes": 0, "output_bytes": 1 << 12}
        worker.send({**limits, "tested": False, "interactive": False})
        worker.send({"code": "pass", "tests": "", "entry_point": "", "timeout": 10, "nonce": ""})
        answer = worker.receive(20)
        return "" if answer["verdict"] == "success" else answer["stderr"].strip() or answer["verdict"]
    except (Gone, TimeoutError):
        return worker.complaint() or "it ended at once"
    finally:
        worker.close()


def choose_level(level: str = "") -> str:
    """The level asked for, or the strongest safe one; said once. Raises UserError with the fix if it is not there."""
    if level and level not in LEVELS:
        raise UserError(f"there is no sandbox level {level!r}: the levels are {', '.join(LEVELS)}")
    reasons = {}
    for name in (level,) if level else SAFE_LEVELS:
        reasons[name] = why_unavailable(name)
        if not reasons[name]:
            announce(name)
            return name
    because = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise UserError(f"no sandbox here to run code in ({because}); {HOW}")


def announce(level: str) -> None:
    if level not in _announced:
        _announced.add(level)
        say(f"sandbox: {level}" + (", which contains nothing but by accident" if level == "unsafe" else ""))
