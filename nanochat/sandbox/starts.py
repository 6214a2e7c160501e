"""Start a supervisor at each level of the sandbox: command line, settings, inherited descriptors."""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

SCRATCH_BYTES = 32 << 20
NOBODY = 65534
INSIDE_UID = 1000  # uid inside the namespace
# Everything readable inside:
MODULES = ("child", "lock", "processes", "program", "wire")
SYSTEM = ("/usr/lib", "/usr/lib64", "/usr/lib32", "/lib", "/lib64")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
EXTRA_FILES = ("/etc/ld.so.cache", "/usr/share/zoneinfo")
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "USER": "nobody",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "MALLOC_ARENA_MAX": "1",  # glibc would reserve 64 MiB of the address space for each of a program's threads
}
BOOT = "import sys; sys.path.insert(0, {!r}); from nanochat.sandbox.child import main; del sys.path[0]; main()"
DEFAULT_SIGNALS = (
    "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
)
PYTHON_FLAGS = ("-s", "-S", "-P", "-B", "-X", "utf8")  # no site-packages, no caches written


class Unavailable(Exception):
    """The level does not work on this machine; the message is the reason."""


@dataclass
class Start:
    """How to start a supervisor."""

    command: list[str]
    settings: dict[str, Any]
    user: int | None = None
    fds: list[int] = field(default_factory=list)
    info: int = -1  # descriptor on which bubblewrap reports the first process of the namespace
    folder: str = ""  # to remove when the supervisor has ended


def python_files() -> tuple[str, list[str]]:
    """(interpreter, paths that must be readable inside), without installed packages."""
    executable = os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)
    library = str(Path(sys.base_prefix).resolve() / "lib")
    covered = any(Path(library).is_relative_to(folder) for folder in SYSTEM)
    return executable, [executable] if covered else [executable, library]


def world_readable(path: str) -> bool:
    """Whether every user may read the file, including access to its parent folders."""
    folders = Path(path).resolve().parents
    return all(folder.stat().st_mode & 0o001 for folder in folders) and bool(Path(path).stat().st_mode & 0o004)


def start_bubblewrap() -> Start:
    """In new namespaces, by bwrap."""
    bwrap = shutil.which("bwrap")
    if not bwrap:
        raise Unavailable("bubblewrap is not installed")
    executable, files = python_files()
    settings = {"level": "bubblewrap", "uid": 0, "may_read": False, "readable": [], "scratch": "/tmp"}
    start = Start([], settings)
    sources = {path: path for path in files}
    if os.geteuid() == 0 and unused_uid() > 0:  # root is exempt from the limit of tasks
        if all(map(world_readable, files)):
            start.user = NOBODY
        else:
            sources = {path: f"/tmp/{i}" for i, path in enumerate(files)}
            start.command = switch_user(bwrap, sources)
    start.info, info_writer = os.pipe()
    start.fds.append(info_writer)
    start.command += [bwrap, *namespaces(bwrap), *mounts(sources), *modules(start), "--remount-ro", "/"]
    start.command += ["--info-fd", str(info_writer), "--chdir", "/tmp", "--", *python(executable, "/sandbox")]
    return start


def switch_user(bwrap: str, sources: dict[str, str]) -> list[str]:
    """Start of a command line that binds {path: another place} and then switches to nobody, who may not read `path`."""
    setpriv = shutil.which("setpriv")
    if not setpriv:
        raise Unavailable("Python is installed where only root may read, and setpriv is missing")
    binds = [word for path, place in sources.items() for word in ("--ro-bind", path, place)]
    folders = ["--dev-bind", "/", "/", "--tmpfs", "/tmp", "--perms", "0755", "--dir", "/tmp"]
    return [bwrap, *folders, *binds, setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]


def namespaces(bwrap: str) -> list[str]:
    """Arguments of bwrap for namespaces, user and capabilities."""
    version = re.search(r"(\d+)\.(\d+)", subprocess.run([bwrap, "--version"], capture_output=True, text=True).stdout)
    nested = ["--disable-userns"] if version and (int(version[1]), int(version[2])) >= (0, 8) else []
    return [
        "--unshare-user",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-ipc",
        "--unshare-uts",
        "--unshare-cgroup-try",
        *nested,
        "--uid",
        str(INSIDE_UID),
        "--gid",
        str(INSIDE_UID),
        "--cap-drop",
        "ALL",
        "--hostname",
        "sandbox",
        "--new-session",
    ]


def mounts(sources: dict[str, str]) -> list[str]:
    """Arguments of bwrap for the file system: system libraries and Python read-only, three devices, a sized tmpfs.

    No /proc and none of the user's files. `sources`: {path inside: path outside} of Python's files.
    """
    words: list[str] = []
    for folder in SYSTEM:
        if os.path.islink(folder):
            words += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            words += ["--ro-bind", folder, folder]
    words += [word for path, source in sources.items() for word in ("--ro-bind", source, path)]
    packages = (f"{sysconfig.get_path('stdlib')}/site-packages", "/usr/lib/python3/dist-packages")
    for folder in filter(os.path.isdir, packages):
        words += ["--tmpfs", folder, "--remount-ro", folder]
    for path in DEVICES:
        words += ["--dev-bind", path, path]
    for path in EXTRA_FILES:
        words += ["--ro-bind-try", path, path]
    return [*words, "--size", str(SCRATCH_BYTES), "--tmpfs", "/tmp"]


def modules(start: Start) -> list[str]:
    """Arguments of bwrap for copies of the modules in MODULES: other users may not be able to read their folder."""
    words: list[str] = []
    for name in MODULES:
        reader, writer = os.pipe()
        start.fds.append(reader)
        with open(writer, "wb") as pipe:
            pipe.write((Path(__file__).parent / f"{name}.py").read_bytes())  # each fits into the 64 KiB of a pipe
        words += ["--ro-bind-data", str(reader), f"/sandbox/nanochat/sandbox/{name}.py"]
    return words


def start_landlock() -> Start:
    """As a plain process that restricts itself; under root as an unused user."""
    if sys.platform != "linux":
        raise Unavailable("Landlock needs Linux")
    executable, files = python_files()
    uid = unused_uid() if os.geteuid() == 0 else 0
    settings = {
        "level": "landlock",
        "uid": uid,
        "may_read": uid > 0 and not all(map(world_readable, files)),
        "readable": [*SYSTEM, *files, *DEVICES, *EXTRA_FILES],
        "scratch": "",
    }
    return Start(python(executable), settings)


def unused_uid() -> int:
    """A user id that owns no files and processes, for sandboxes of root.

    0 if root cannot switch to one: the namespace has no other id, or the capabilities for it were dropped.
    """
    rights = int(Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0], 16)
    if ~rights & (1 << 6 | 1 << 7):  # CAP_SETGID, CAP_SETUID
        return 0
    ranges = [list(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    last = max(first + count for first, _, count in ranges) - 2
    return max(0, min(last, 1_500_000_000 + os.getpid()))


def start_unsafe() -> Start:
    """As a plain process with resource limits only."""
    if not hasattr(os, "fork"):
        raise Unavailable("running programs needs fork, which this system lacks")
    folder = tempfile.mkdtemp(prefix="nanochat-unsafe-")
    settings = {"level": "unsafe", "uid": 0, "may_read": False, "readable": [], "scratch": folder}
    return Start(python(python_files()[0]), settings, folder=folder)


def python(executable: str, root: str = "") -> list[str]:
    """Command line of the supervisor; `root` holds the package, by default where it is now."""
    return [executable, *PYTHON_FLAGS, "-c", BOOT.format(root or str(Path(__file__).resolve().parents[2]))]


def popen(start: Start, stderr: IO[bytes]) -> "subprocess.Popen[bytes]":
    """Start the supervisor without this process's environment and signal state."""
    command = start.command
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:  # inherited, it would make bubblewrap wait forever
        command = [python_files()[0], "-S", "-c", DEFAULT_SIGNALS, *command]
    user: dict[str, Any] = {"user": start.user, "group": start.user, "extra_groups": []} if start.user else {}
    blocked = signal.pthread_sigmask(signal.SIG_SETMASK, [])  # of this thread only
    try:
        # Its own session, so that Ctrl-C in the terminal does not reach it.
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            stderr=stderr,
            env=ENVIRONMENT,
            pass_fds=start.fds,
            cwd="/",
            start_new_session=True,
            **user,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


STARTS = {"bubblewrap": start_bubblewrap, "landlock": start_landlock, "unsafe": start_unsafe}
