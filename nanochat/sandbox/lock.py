"""A process restricts itself: resource limits, Landlock, a system call filter. Linux, no libraries.

This file also runs inside the sandbox, in an interpreter without site-packages: standard library only. The packages
on PyPI do not fit: pyseccomp needs a C library that it does not ship, landlock covers neither signals nor abstract
sockets. tests/test_execution.py checks the numbers below against libseccomp, if installed.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import resource
import struct
from collections.abc import Iterable

# Allowed system calls with their numbers on (x86_64, aarch64); - if it does not exist. Others fail with EPERM:
# sockets, new processes, other programs, ptrace, mounts, namespaces, keys, io_uring, bpf, memfd and the rest.
ALLOWED = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70,
preadv2 327 286, pwritev2 328 287, close 3 57, lseek 8 62, stat 4 -, fstat 5 80, lstat 6 -,
newfstatat 262 79, statx 332 291, access 21 -, faccessat 269 48, faccessat2 439 439, readlink 89 -, readlinkat 267 78,
getcwd 79 17, getdents 78 -, getdents64 217 61, statfs 137 43, fstatfs 138 44, chdir 80 49, fchdir 81 50,
fadvise64 221 223, dup 32 23, dup2 33 -, dup3 292 24, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72,
epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, epoll_pwait2 441 441,
eventfd 284 -, eventfd2 290 19, pipe 22 -, pipe2 293 59, recvfrom 45 207,
shutdown 48 210, getsockopt 55 209, getsockname 51 204, getpeername 52 205,
mmap 9 222, munmap 11 215, mprotect 10 226, mremap 25 216, madvise 28 233, brk 12 214, mincore 27 232,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137,
rt_sigsuspend 130 133, sigaltstack 131 132, pause 34 -, alarm 37 -, setitimer 38 103, getitimer 36 102,
restart_syscall 219 128, clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101,
gettimeofday 96 169, time 201 -, times 100 153, timerfd_create 283 85, timerfd_settime 286 86, timerfd_gettime 287 87,
getpid 39 172, gettid 186 178, getppid 110 173, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177,
getgroups 115 158, getresuid 118 148, getresgid 120 150, getpgrp 111 -, uname 63 160, sysinfo 99 179,
getrlimit 97 163, setrlimit 160 164, getrusage 98 165, getcpu 309 168, sched_yield 24 124, umask 95 166,
getrandom 318 278, futex 202 98, futex_waitv 449 449, set_robust_list 273 99, set_tid_address 218 96, rseq 334 293,
membarrier 324 283, arch_prctl 158 -, exit 60 93, exit_group 231 94, wait4 61 260, waitid 247 95
"""
# Allowed besides if there is a scratch folder, on a file system where nothing else can be written.
FILES = """
open 2 -, openat 257 56, creat 85 -, ftruncate 77 46, truncate 76 45, fallocate 285 47, fsync 74 82, fdatasync 75 83,
mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276,
link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, chmod 90 -, fchmod 91 52, fchmodat 268 53, utime 132 -,
utimes 235 -, utimensat 280 88, futimesat 261 -, flock 73 32, copy_file_range 326 285, sendfile 40 71
"""
CLONE = "clone 56 220"
# Allowed if the argument at that index has one of these values. They leave out what would reach other processes, and
# kernel memory that no limit counts: a thread's own table of descriptors, record locks.
VALUES: dict[str, tuple[int, tuple[int, ...]]] = {
    CLONE: (0, (0x3D0F00, 0x7D0F00)),  # the flags of a thread that shares everything, by glibc and by musl
    "close_range 436 436": (2, (0, 4)),  # not CLOSE_RANGE_UNSHARE
    "fcntl 72 25": (1, (0, 1, 2, 3, 4, 1030, 1032)),  # no owners, signals, leases and record locks
    "ioctl 16 29": (1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),  # for files and pipes
    "prctl 157 167": (0, (15, 16)),  # a thread's name
    "prlimit64 302 261": (0, (0,)),  # on itself only
    "socketpair 53 199": (0, (1,)),  # AF_UNIX
    "sendto 44 206": (5, (0,)),  # to the connected end only: a datagram pair could send to any address
    "sched_getaffinity 204 123": (0, (0,)),
}
SELF_ONLY = ("kill 62 129", "tgkill 234 131")  # signals to its own process id only
CLONE3 = "clone3 435 435"  # its flags are in memory, which a filter cannot read; libc falls back to clone
OPENS = {"open 2 -": 1, "openat 257 56": 2}  # with the index of their flags
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
ARCHITECTURES = {
    "x86_64": (0, 0xC000003E),
    "aarch64": (1, 0xC00000B7),
}  # column of the numbers above, AUDIT_ARCH of linux/audit.h
NEWEST = 463  # higher numbers are calls newer than this list

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand
LOAD, JUMP_EQ, JUMP_GE, JUMP_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF, linux/bpf_common.h
ALLOW, KILL, REFUSE, NOTIFY = 0x7FFF0000, 0x80000000, 0x50000, 0x7FC00000  # linux/seccomp.h; REFUSE | errno
NEW_LISTENER = 8  # SECCOMP_FILTER_FLAG_NEW_LISTENER
RECEIVE, SEND, CONTINUE = 0xC0502100, 0xC0182101, 1  # SECCOMP_IOCTL_NOTIF_*, SECCOMP_USER_NOTIF_FLAG_CONTINUE
NOTICE_BYTES = 80  # struct seccomp_notif


class Unsupported(Exception):
    """This kernel or processor lacks a feature that the sandbox needs."""


def _call(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise Unsupported(f"{what}: {os.strerror(code)}")
    return result


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


# ---------------------------------------------------------------------------------------------------
# System call filter (man 2 seccomp)


def build_filter(pid: int, files: bool, machine: str = "") -> list[Instruction]:
    """The BPF program that restricts process `pid` to the calls above; `files` adds those that write files."""
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        raise Unsupported(f"no system call list for {machine}")
    column, architecture = ARCHITECTURES[machine]
    names = ",".join([ALLOWED, FILES] if files else [ALLOWED]).split(",")
    rules: dict[str, list[Instruction]] = {entry: [(RETURN, 0, 0, ALLOW)] for entry in names}
    rules |= {entry: if_one_of(*value) for entry, value in VALUES.items()}
    rules |= {entry: if_one_of(0, (pid,)) for entry in SELF_ONLY}
    rules |= {} if files else {entry: unless_writing(index) for entry, index in OPENS.items()}
    rules[CLONE3] = [(RETURN, 0, 0, REFUSE | errno.ENOSYS)]
    code = [(LOAD, 0, 0, 4), (JUMP_EQ, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    for entry, body in rules.items():
        if (number := entry.split()[1 + column]) != "-":
            code += [(JUMP_EQ, 0, len(body), int(number)), *body]
    return [*code, (JUMP_GE, 0, 1, NEWEST), (RETURN, 0, 0, REFUSE | errno.ENOSYS), (RETURN, 0, 0, REFUSE | errno.EPERM)]


def load_argument(index: int) -> Instruction:
    return LOAD, 0, 0, 16 + 8 * index  # low half: every checked argument is an int


def if_one_of(index: int, values: Iterable[int]) -> list[Instruction]:
    """Allow a call whose argument at `index` is one of `values`."""
    tests = [pair for value in values for pair in ((JUMP_EQ, 0, 1, value), (RETURN, 0, 0, ALLOW))]
    return [load_argument(index), *tests, (RETURN, 0, 0, REFUSE | errno.EPERM)]


def unless_writing(index: int) -> list[Instruction]:
    """Allow a call whose flags at `index` open a file for reading only."""
    refusal = (RETURN, 0, 0, REFUSE | errno.EACCES)
    return [load_argument(index), (JUMP_SET, 0, 1, WRITING), refusal, (RETURN, 0, 0, ALLOW)]


def install_filter(code: list[Instruction], flags: int = 0) -> int:
    """Apply a filter to this process, for good; the strictest of several counts. Returns its listener, if asked for."""
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer)))
    libc = _libc()
    _call(libc.prctl(38, 1, 0, 0, 0), "no_new_privs")
    number = (317, 277)[ARCHITECTURES[platform.machine()][0]]
    return _call(libc.syscall(number, 1, ctypes.c_uint(flags), header), "seccomp")


# ---------------------------------------------------------------------------------------------------
# Counting threads where the process has no user namespace of its own, in which RLIMIT_NPROC would count them


def ask_for_threads() -> int:
    """Make each start of a thread by this process wait for permission; returns the descriptor that grants it."""
    clone = int(CLONE.split()[1 + ARCHITECTURES[platform.machine()][0]])
    code = [(LOAD, 0, 0, 0), (JUMP_EQ, 0, 1, clone), (RETURN, 0, 0, NOTIFY), (RETURN, 0, 0, ALLOW)]
    return install_filter(code, NEW_LISTENER)


def permit_thread(listener: int, pid: int, limit: int) -> bool:
    """Answer a request of `pid`: it may start a thread while it has fewer than `limit` beside its first. True.

    Requests that arrive together are answered by the same count, so a program can reach twice the limit.
    """
    notice = bytearray(NOTICE_BYTES)
    with contextlib.suppress(OSError):  # killed meanwhile
        fcntl.ioctl(listener, RECEIVE, notice)
        others = os.stat(f"/proc/{pid}/task").st_nlink - 3  # beside the first, and two links of any folder
        error, flags = (0, CONTINUE) if others < limit else (-errno.EAGAIN, 0)
        fcntl.ioctl(listener, SEND, struct.pack("=8sqiI", notice[:8], 0, error, flags))
    return True


# ---------------------------------------------------------------------------------------------------
# Landlock (man 7 landlock)

READ_FILE, READ_DIR = 1 << 2, 1 << 3
SCOPE_ABSTRACT_SOCKET, SCOPE_SIGNAL = 1, 2


def landlock_abi() -> int:
    """Version of Landlock in this kernel, 0 if it has none."""
    return max(0, _libc().syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1)))


def restrict_files(readable: Iterable[str]) -> None:
    """Restrict this process to reading below `readable`: it can open nothing else and write nothing."""
    libc, abi = _libc(), landlock_abi()
    if abi < 1:
        raise Unsupported("this kernel has no Landlock")
    # Rights by version: 13 in the first, then linking, truncating and device ioctls.
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    ruleset = struct.pack("QQQ", rights, 3 if abi >= 4 else 0, SCOPE_ABSTRACT_SOCKET | SCOPE_SIGNAL if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    handle = _call(libc.syscall(444, ruleset, ctypes.c_size_t(size), ctypes.c_uint(0)), "landlock_create_ruleset")
    for path in readable:
        if not os.path.exists(path):
            continue
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        access = READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE
        rule = struct.pack("=Qi", access, fd)
        _call(libc.syscall(445, handle, 1, rule, ctypes.c_uint(0)), "landlock_add_rule")
        os.close(fd)
    _call(libc.prctl(38, 1, 0, 0, 0), "no_new_privs")
    _call(libc.syscall(446, handle, ctypes.c_uint(0)), "landlock_restrict_self")
    os.close(handle)


# ---------------------------------------------------------------------------------------------------
# User, capabilities and resources


def hide_memory() -> None:
    """Deny unprivileged processes access to the memory of this one and its children (man 2 PR_SET_DUMPABLE)."""
    _call(_libc().prctl(4, 0, 0, 0, 0), "PR_SET_DUMPABLE")


def die_with_parent() -> None:
    """Receive SIGKILL when the parent exits."""
    _call(_libc().prctl(1, 9, 0, 0, 0), "PR_SET_PDEATHSIG")


READ_RIGHT, OVERRIDE_RIGHT = 1 << 2, 1 << 1  # CAP_DAC_READ_SEARCH; a container may have only CAP_DAC_OVERRIDE


def drop_privileges(uid: int, may_read: bool) -> None:
    """Switch to user `uid` for good (0: keep the user) and drop all capabilities.

    `may_read` keeps the one to read any file, for a Python installed in root's home; Landlock and the filter still
    limit which files, and to reading.
    """
    libc, header = _libc(), struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    held = ctypes.create_string_buffer(24)
    _call(libc.capget(header, held), "capget")
    permitted = struct.unpack("6I", held.raw)[1] if may_read else 0
    kept = permitted & READ_RIGHT or permitted & OVERRIDE_RIGHT
    if uid:
        _call(libc.prctl(8, 1, 0, 0, 0), "PR_SET_KEEPCAPS")
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _call(libc.capset(header, struct.pack("6I", kept, kept, 0, 0, 0, 0)), "capset")


def limit_resources(cpu_seconds: int, memory_bytes: int, file_bytes: int, tasks: int) -> None:
    """Set rlimits (man 2 setrlimit); 0: no limit of CPU time or of tasks (threads of this user in its namespace)."""
    limits = {
        "AS": memory_bytes,
        "FSIZE": file_bytes,
        "NOFILE": 64,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
        "STACK": 8 << 20,
        "SIGPENDING": 64,
    }
    if tasks:
        limits["NPROC"] = tasks
    for name, value in limits.items():
        which = getattr(resource, f"RLIMIT_{name}", None)
        if which is None:
            continue
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(which, (value, value))
        except (ValueError, OSError):
            if platform.system() == "Linux":  # macOS does not support all
                raise
    if cpu_seconds:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
