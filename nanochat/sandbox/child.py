"""The supervisor inside the sandbox: forks programs, watches them and reports how they ended.

It runs none of their code. Programs are forked, which saves the start of an interpreter, and cannot signal, trace or
fork. If a program leaves files behind, the sandbox is not reused. Standard library only.
"""

import contextlib
import fcntl
import gc
import os
import resource
import select
import signal
import site
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from nanochat.sandbox import lock, program
from nanochat.sandbox.processes import ENDS, ESCAPED_STATUS, Child, Output, verdict_of
from nanochat.sandbox.wire import Gone, frame_of, read_frame, write_frame

REQUESTS, ANSWERS = 0, 1
TICK_SECONDS, END_TICK_SECONDS = 0.05, 0.001  # poll interval while a program runs; and once it is about to exit
MAX_FILES = 2000
MAX_THREADS = 64  # of a program, beside its first; of its tests as many
OTHER_TASKS = 5  # in the namespace: of bubblewrap, two supervisors, the program and its tests
MAX_STACK_BYTES = 8 << 20
OWN_FRAMES = 9  # on the stack below a program's first
MAX_DESCRIPTORS = 256
PRELOADED = (
    "ast bisect collections copy datetime decimal fractions functools heapq itertools json math operator "
    "random re statistics string threading typing"
)


@dataclass
class Settings:
    """Settings from the parent, the same for every program of this supervisor."""

    level: str
    uid: int  # to switch to if the supervisor is root; 0: keep the user
    may_read: bool  # keep the capability to read everything: Python is installed where only root may read
    readable: list[str]
    scratch: str  # folder that programs may write; "" if none


class Supervisor:
    """Runs one job: a program with or without tests, or a session."""

    def __init__(self, settings: Settings, limits: dict[str, Any]) -> None:
        self.settings, self.limits = settings, limits
        self.untouched = self.scratch_state()
        self.output = Output(limits["output_bytes"])
        tested = [end.detach() for end in socket.socketpair()] if limits["tested"] else []
        self.program = self.fork(tested[:1])
        self.tests = self.fork(tested[1:]) if tested else None
        self.children = [child for child in (self.program, self.tests) if child]
        for fd in tested:
            os.close(fd)

    def run(self) -> None:
        """Run the job, and in a session all its cells. None of its processes is left when this returns."""
        try:
            while self.run_cell():
                pass
        finally:
            for child in self.children:
                child.kill()
                if self.settings.level == "unsafe":  # it may have forked; at the other levels it cannot
                    with contextlib.suppress(OSError):
                        os.killpg(child.pid, signal.SIGKILL)

    def run_cell(self) -> bool:
        """Run a program, or a session's next cell. Returns whether the session continues."""
        # Read after the fork: the job holds secrets (nonce, tests) that the program must not see.
        job = read_frame(REQUESTS)
        deadline = time.monotonic() + job["timeout"]
        interactive = self.limits["interactive"]
        if interactive:
            os.kill(self.program.pid, signal.SIGCONT)
            self.program.ended, self.program.received = "", bytearray()
        verdict = self.send_requests(job, deadline) or self.watch(deadline)
        goes_on = verdict in ("success", "error", "out_of_memory") and self.program.status is None
        continues = interactive and goes_on
        if continues:
            os.kill(self.program.pid, signal.SIGSTOP)  # so that no thread runs between cells
        else:
            for child in self.children:
                child.kill()
        stdout, stderr = self.output.take()
        clean = self.settings.level != "unsafe" and self.scratch_state() == self.untouched
        answer = {"verdict": verdict, "stdout": stdout, "stderr": stderr, "over": not continues, "clean": clean}
        write_frame(ANSWERS, {**answer, "nonce": job["nonce"]} if verdict == "success" else answer)
        return continues

    def scratch_state(self) -> int:
        """Changes with every file created or removed in the scratch folder; a program cannot reset it."""
        return os.stat(self.settings.scratch).st_ctime_ns if self.settings.scratch else 0

    def fork(self, calls: list[int]) -> Child:
        """Fork a restricted process that waits for its request. `calls`: its end of the channel of the tests."""
        own_end, child_end = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                self.become_program([*self.output.write_ends, child_end.fileno(), *calls])
            except BaseException as error:
                with contextlib.suppress(OSError):
                    os.write(2, f"the sandbox could not be locked: {error!r}\n".encode())
                os._exit(70)
            try:
                program.run_requests(self.limits["interactive"])
            finally:
                os._exit(ESCAPED_STATUS)  # never return into the supervisor's code
        child_end.close()
        listeners = socket.recv_fds(own_end, 1, 1)[1]  # waits until the process is locked
        return Child(pid, own_end, listeners[0] if listeners else -1)

    def become_program(self, fds: list[int]) -> None:
        """In the forked process: keep descriptors 0 to 4, apply limits and filter. No untrusted code has run yet."""
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in fds]
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, fd in enumerate(high, 1):
            os.dup2(fd, number)
        os.closerange(1 + len(high), MAX_DESCRIPTORS)
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            mode = "r" if number == 0 else "w"
            errors = "backslashreplace" if name == "stderr" else "surrogateescape"
            stream = os.fdopen(number, mode, 1, encoding="utf-8", errors=errors, closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir(self.settings.scratch or "/")
        os.setsid()
        # All threads together take at most half of the address space.
        threading.stack_size(min(MAX_STACK_BYTES, self.limits["memory_bytes"] // (2 * MAX_THREADS)))
        self.lock()
        sys.modules["random"].seed(0)  # deterministic runs
        sys.setrecursionlimit(sys.getrecursionlimit() + OWN_FRAMES)

    def lock(self) -> None:
        """Apply limits, Landlock and, last, the filter, after which none of the others could be changed."""
        settings, limits, listeners = self.settings, self.limits, []
        if settings.level == "landlock":
            lock.drop_privileges(settings.uid, settings.may_read)
        # Without a namespace of its own, the limit of tasks would count all processes of the user.
        tasks = MAX_THREADS * (1 + limits["tested"]) + OTHER_TASKS if settings.level == "bubblewrap" else 0
        lock.limit_resources(limits["cpu_seconds"], limits["memory_bytes"], limits["file_bytes"], tasks)
        if settings.level != "unsafe":
            lock.die_with_parent()
        if settings.level == "landlock":
            lock.restrict_files(settings.readable)
            listeners.append(lock.ask_for_threads())
        with socket.socket(fileno=os.dup(program.REPORT)) as report:
            socket.send_fds(report, [b"\0"], listeners)  # before the filter, which forbids it
        for fd in listeners:
            os.close(fd)
        if settings.level != "unsafe":
            lock.install_filter(lock.build_filter(os.getpid(), files=bool(settings.scratch)))

    # -----------------------------------------------------------------------------------------------
    # Watching the program

    def send_requests(self, job: dict[str, Any], deadline: float) -> str:
        """Send the processes their requests. Returns "timeout" if a session is too busy to read it, else ""."""
        entry_point = job["entry_point"] if self.tests else ""
        requests = [
            {"name": "program", "code": job["code"], "entry_point": entry_point},
            {"name": "tests", "code": job["tests"], "entry_point": entry_point},
        ]
        for child, request in zip(self.children, requests):
            child.report.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                child.report.sendall(frame_of(request))
            except TimeoutError:
                return "timeout"
            except OSError:
                pass  # it has died; `watch` will notice
            child.report.setblocking(False)
        return ""

    def watch(self, deadline: float) -> str:
        """Read output and reports until there is a verdict, and return it."""
        poller = select.poll()
        readers: dict[int, Callable[[], bool]] = {fd: partial(self.output.read, fd) for fd in self.output.texts}
        for child in self.children:
            readers[child.report.fileno()] = child.listen
            if child.listener >= 0:
                readers[child.listener] = partial(lock.permit_thread, child.listener, child.pid, MAX_THREADS)
        for fd in (*readers, REQUESTS):
            poller.register(fd, select.POLLIN)
        tick = TICK_SECONDS
        while True:
            for fd, event in poller.poll(max(0.0, min(tick, deadline - time.monotonic())) * 1000):
                if fd == REQUESTS:
                    raise Gone("the parent")  # it sends nothing meanwhile, so this is the end of the pipe
                if not (event & select.POLLIN and readers[fd]()):
                    poller.unregister(fd)
                    tick = tick if fd in self.output.texts else END_TICK_SECONDS
            if self.output.full:
                return "output_limit"
            if time.monotonic() >= deadline:
                return "timeout"
            if self.too_many_files():
                return "file_limit"
            if verdict := self.decide():
                return verdict

    def too_many_files(self) -> bool:
        """Whether the scratch folder has too many files: tmpfs limits bytes only, but each file takes kernel memory."""
        if not self.settings.scratch or self.settings.level == "unsafe":
            return False
        space = os.statvfs(self.settings.scratch)
        return space.f_files - space.f_ffree > MAX_FILES

    def decide(self) -> str:
        """The verdict once it is known, else "". With tests, success can only come from them."""
        program, tests = self.program, self.tests
        if self.limits["interactive"] and program.ended in ENDS and program.ended != "exit":
            return ENDS[program.ended]
        if tests and tests.ended == "end" and tests.poll():
            return verdict_of(tests)
        if program.poll():
            program.listen()  # its report may have arrived since the last poll
            if not tests or program.ended != "end":
                return verdict_of(program)
        if tests and tests.poll():
            tests.listen()
            if tests.ended != "gone":
                return verdict_of(tests)
            if program.status is not None:  # it closed the channel to its tests
                return "early_exit"
        return ""


def main() -> None:
    """Read the settings, then serve jobs until the parent closes the pipe.

    Each job gets its own supervisor, forked before the job is read, so that no program can find another's code.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # may be ignored in the parent
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    settings = Settings(**read_frame(REQUESTS))
    if settings.level != "unsafe":
        lock.hide_memory()
        lock.build_filter(0, files=True)  # raises Unsupported early
        if settings.level == "landlock" and not lock.landlock_abi():
            raise lock.Unsupported("this kernel has no Landlock")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_DESCRIPTORS, hard))
    for name in PRELOADED.split():
        __import__(name)
    for define in (site.setquit, site.setcopyright, site.sethelper):  # built-in functions that `python -S` lacks
        define()
    gc.freeze()  # collections in programs look at their own objects only
    write_frame(ANSWERS, {"ready": True})
    waiting = select.poll()
    waiting.register(REQUESTS, select.POLLIN)
    while waiting.poll():
        pid = os.fork()
        if pid == 0:
            os._exit(take_job(settings))
        if os.waitpid(pid, 0)[1] != 0:
            return


def take_job(settings: Settings) -> int:
    """Run the next job. Returns 0, or 1 if the parent has closed the pipe."""
    if settings.level != "unsafe":
        lock.die_with_parent()
    try:
        Supervisor(settings, read_frame(REQUESTS)).run()
    except Gone:
        return 1
    return 0
