"""Inside the sandbox: the supervisor, which starts programs, watches them and says how they ended.

It runs none of their code. Each program is forked, so that no interpreter has to start, and may signal, trace and
fork nothing. If it leaves anything behind, the next program gets a new sandbox. Standard library only.
"""

import contextlib
import fcntl
import os
import resource
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any

from nanochat.sandbox import lock, program
from nanochat.sandbox.processes import ENDS, Child, Output, verdict_of
from nanochat.sandbox.wire import Gone, frame_of, read_frame, write_frame

REQUESTS, ANSWERS = 0, 1
TICK_SECONDS, END_TICK_SECONDS = 0.05, 0.001  # while a program runs; once it is about to be gone
MAX_FILES = 2000
MAX_THREADS = 64
MAX_DESCRIPTORS = 256
PRELOADED = (
    "ast bisect collections copy datetime decimal fractions functools heapq itertools json math operator "
    "random re statistics string threading typing"
)


@dataclass
class Settings:
    """What holds for every program of this supervisor; from the parent."""

    level: str
    uid: int  # to turn into where the supervisor is root; 0: stay who it is
    may_read: bool  # Python lies where only root may read
    readable: list[str]
    scratch: str  # the programs' folder; "" where they may write nowhere


class Supervisor:
    """Of one job: a program with or without tests, or a session."""

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
        """Answer the job, and in a session the cells that follow. Nothing of it runs on when this returns."""
        try:
            while self.run_cell():
                pass
        finally:
            for child in self.children:
                child.kill()
                if self.settings.level == "unsafe":  # it may have forked; elsewhere it could not
                    with contextlib.suppress(OSError):
                        os.killpg(child.pid, signal.SIGKILL)

    def run_cell(self) -> bool:
        """Run a program, or a session's next piece. Whether the session goes on."""
        # What the programs must not know is read only now: they were forked before.
        job = read_frame(REQUESTS)
        deadline = time.monotonic() + job["timeout"]
        interactive = self.limits["interactive"]
        if interactive:
            os.kill(self.program.pid, signal.SIGCONT)
            self.program.ended, self.program.received = "", bytearray()
        verdict = self.hand_over(job, deadline) or self.watch(deadline)
        goes_on = interactive and verdict in ("success", "error", "out_of_memory")
        if goes_on:
            os.kill(self.program.pid, signal.SIGSTOP)  # no thread of a session works between its cells
        else:
            for child in self.children:
                child.kill()
        stdout, stderr = self.output.take()
        clean = self.settings.level != "unsafe" and self.scratch_state() == self.untouched
        answer = {"verdict": verdict, "stdout": stdout, "stderr": stderr, "over": not goes_on, "clean": clean}
        write_frame(ANSWERS, {**answer, "nonce": job["nonce"]} if verdict == "success" else answer)
        return goes_on

    def scratch_state(self) -> int:
        """Changes with every file made or removed in the scratch folder; a program cannot set it back."""
        return os.stat(self.settings.scratch).st_ctime_ns if self.settings.scratch else 0

    def fork(self, calls: list[int]) -> Child:
        """A new process, locked in, that waits for its request. `calls`: its end of the channel of the tests."""
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                self.become_program([*self.output.write_ends, theirs.fileno(), *calls])
            except BaseException as error:
                with contextlib.suppress(OSError):
                    os.write(2, f"the sandbox could not be closed: {error!r}\n".encode())
                os._exit(70)
            try:
                program.run_requests(self.limits["interactive"])
            finally:
                os._exit(71)  # never back into the supervisor's code
        theirs.close()
        return Child(pid, ours)

    def become_program(self, fds: list[int]) -> None:
        """In the forked process: descriptors 0 to 4 and no others, limits, filter. No code has run before."""
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in fds]
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, fd in enumerate(high, 1):
            os.dup2(fd, number)
        os.closerange(1 + len(high), MAX_DESCRIPTORS)
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            mode = "r" if number == 0 else "w"
            stream = os.fdopen(number, mode, 1, encoding="utf-8", errors="surrogateescape", closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir(self.settings.scratch or "/")
        os.setsid()
        self.lock()
        sys.modules["random"].seed(0)  # the same program, the same run

    def lock(self) -> None:
        """Strongest last: after the filter nothing of this can be done again."""
        settings, limits, tasks = self.settings, self.limits, MAX_THREADS
        if settings.level == "unsafe":
            tasks = 0  # would count, and hinder, all the user's processes
        elif settings.level == "landlock":
            tasks += 0 if settings.uid else lock.tasks_of_user()
            lock.give_up_rights(settings.uid, settings.may_read)
        lock.limit_resources(limits["cpu_seconds"], limits["memory_bytes"], limits["file_bytes"], tasks)
        if settings.level == "unsafe":
            return
        lock.die_with_parent()
        if settings.level == "landlock":
            lock.restrict_files(settings.readable)
        lock.filter_system_calls(files=bool(settings.scratch))

    # -----------------------------------------------------------------------------------------------
    # Watching

    def hand_over(self, job: dict[str, Any], deadline: float) -> str:
        """Give the processes their requests; "timeout" if a session's program is too busy to take it."""
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
                pass  # it has died, which is noticed where it is watched
            child.report.setblocking(False)
        return ""

    def watch(self, deadline: float) -> str:
        """Read what comes until the verdict stands, and return it."""
        poller = select.poll()
        reports = {child.report.fileno(): child for child in self.children}
        for fd in (*self.output.texts, *reports, REQUESTS):
            poller.register(fd, select.POLLIN)
        tick = TICK_SECONDS
        while True:
            for fd, _ in poller.poll(max(0.0, min(tick, deadline - time.monotonic())) * 1000):
                if fd == REQUESTS:
                    raise Gone("the parent")  # it writes nothing meanwhile, so it has closed
                if not (self.output.read(fd) if fd in self.output.texts else reports[fd].listen()):
                    poller.unregister(fd)
                    tick = END_TICK_SECONDS if fd in reports else tick
            if self.output.full:
                return "output_limit"
            if time.monotonic() >= deadline:
                return "timeout"
            if self.too_many_files():
                return "file_limit"
            if verdict := self.decide():
                return verdict

    def too_many_files(self) -> bool:
        """A sized tmpfs limits bytes, not files, and every file takes memory of the kernel."""
        if not self.settings.scratch or self.settings.level == "unsafe":
            return False
        space = os.statvfs(self.settings.scratch)
        return space.f_files - space.f_ffree > MAX_FILES

    def decide(self) -> str:
        """The verdict once it stands, else nothing. Where there are tests, only they can say success."""
        program, tests = self.program, self.tests
        if self.limits["interactive"] and program.ended in ENDS and program.ended != "exit":
            return ENDS[program.ended]
        if tests and tests.ended == "end" and tests.poll():
            return verdict_of(tests)
        if program.poll():
            program.listen()  # its last word may have come after the last look
            if not tests or program.ended != "end":
                return verdict_of(program)
        if tests and tests.poll():
            tests.listen()
            if tests.ended != "gone":
                return verdict_of(tests)
            if program.status is not None:  # it hung up on its tests
                return "early_exit"
        return ""


def main() -> None:
    """Read the settings, then take job after job; ends with the parent.

    Each job has a supervisor of its own, forked before the job is read, so no program finds another's text here.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whatever the parent left there
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    settings = Settings(**read_frame(REQUESTS))
    if settings.level != "unsafe":
        lock.hide_memory()
        lock.build_filter(os.getpid(), files=True)  # what is unsupported is better said now
        if settings.level == "landlock" and not lock.landlock_abi():
            raise lock.Unsupported("this kernel has no Landlock")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_DESCRIPTORS, hard))
    for name in PRELOADED.split():
        __import__(name)
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
    """Do the job that waits to be read; 0 if there was one."""
    if settings.level != "unsafe":
        lock.die_with_parent()
    try:
        Supervisor(settings, read_frame(REQUESTS)).run()
    except Gone:
        return 1
    return 0
