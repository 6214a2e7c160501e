"""Malicious programs for tests/test_execution.py, with the verdict each must get.

A program prints ESCAPED if its attack worked. The test defines the names in capitals: a file and a process of the user,
sockets that are being listened on.
"""

PRELUDE = """
import ctypes, errno, os, platform, socket, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
ARM = platform.machine() == "aarch64"
def attempt(action, *arguments):
    try:
        got = action(*arguments)
    except (OSError, MemoryError, RuntimeError, ValueError) as error:
        print("held", type(error).__name__)
    else:
        print("ESCAPED", got)
def native(name, *arguments):
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)
def raw(x86, arm, *arguments):
    got = libc.syscall(arm if ARM else x86, *arguments)
    if got == -1:
        raise OSError(ctypes.get_errno(), "system call")
    return got
"""

# Attacks of one expression each, arguments of `attempt`, which prints whether it was stopped; the program goes on.
ATTEMPTS = {
    # files
    "read the user's file": "open, CANARY",
    "read a secret the user may read": "open, '/etc/passwd'",
    "write the user's file": "open, CANARY, 'w'",
    "append to the user's file": "open, CANARY, 'a'",
    "truncate by opening": "os.open, CANARY, os.O_RDONLY | os.O_TRUNC",
    "truncate by name": "os.truncate, CANARY, 0",
    "remove the user's file": "os.unlink, CANARY",
    "rename the user's file": "os.rename, CANARY, CANARY + '2'",
    "make it unreadable": "os.chmod, CANARY, 0",
    "change its owner": "os.chown, CANARY, 1, 1",
    "change its times": "os.utime, CANARY, (1, 1)",
    "mark it": "os.setxattr, CANARY, 'user.x', b'x'",
    "make a file beside it": "open, os.path.dirname(CANARY) + '/new', 'w'",
    "make a folder beside it": "os.mkdir, os.path.dirname(CANARY) + '/new'",
    "make a pipe beside it": "os.mkfifo, os.path.dirname(CANARY) + '/new'",
    "list the user's folder": "os.listdir, os.path.dirname(CANARY)",
    "list the root's home": "os.listdir, '/home'",
    "list other processes": "os.listdir, '/proc'",
    "link to it and read": "lambda: (os.symlink(CANARY, 'way'), open('way').read())",
    "link hard to it": "os.link, CANARY, 'way'",
    "a way round with dots": "open, '../' * 40 + CANARY",
    "a way through /proc": "open, '/proc/self/root' + CANARY",
    "a way through the first process": "open, '/proc/1/root' + CANARY",
    "a way through the folder of descriptors": "os.listdir, '/proc/self/fd'",
    "change Python's library": "open, os.__file__, 'a'",
    "write into Python's library": "open, os.path.dirname(os.__file__) + '/evil.py', 'w'",
    "write where packages are": "open, os.path.dirname(os.__file__) + '/site-packages/evil.py', 'w'",
    "write where the system's packages are": "open, '/usr/lib/python3/dist-packages/evil.py', 'w'",
    "write into the root": "open, '/left', 'w'",
    "write among the devices": "open, '/dev/left', 'w'",
    "write among the system's files": "open, '/usr/share/left', 'w'",
    "write the supervisor's code": "open, '/sandbox/nanochat/sandbox/child.py', 'w'",
    "read this project": "open, PROJECT + '/README.md'",
    "the kernel's switches": "open, '/proc/sys/kernel/core_pattern', 'w'",
    "the kernel's objects": "os.listdir, '/sys'",
    "shared memory": "open, '/dev/shm/left', 'w'",
    "the memory of the machine": "open, '/dev/mem', 'rb'",
    "the terminal": "open, '/dev/tty', 'r+'",
    "a device of its own": "os.mknod, 'disk', 0o60600, os.makedev(8, 0)",
    "a file with holes, 1 TiB long": "lambda: os.truncate(os.open('holes', os.O_CREAT | os.O_RDWR), 1 << 40)",
    "fill the disk": "lambda: [open(f'fill{i}', 'wb').write(bytes(8 << 20)) for i in range(64)]",
    "another root": "os.chroot, '/tmp'",
    "locks on parts of a file": "lambda: __import__('fcntl').lockf(os.open(os.__file__, os.O_RDONLY), 5, 1, 0)",
    "its output once more": "os.open, '/proc/self/fd/1', os.O_RDONLY",
    "its errors once more": "os.open, '/dev/fd/2', os.O_RDONLY",
    "its output by another name": "os.open, '/dev/stdout', os.O_RDONLY",
    # processes and memory
    "the environment of the parent": "open, f'/proc/{PARENT}/environ'",
    "the memory of the parent": "open, f'/proc/{PARENT}/mem', 'rb'",
    "its own memory as a file": "open, '/proc/self/mem', 'rb'",
    "signal the parent": "os.kill, PARENT, 0",
    "end the parent": "os.kill, PARENT, 15",
    "signal the supervisor": "os.kill, os.getppid(), 9",
    "signal everything": "os.kill, -1, 9",
    "signal its group": "os.kill, 0, 9",
    "signal a thread of the parent": "raw, 234, 131, PARENT, PARENT, 15",
    "signal through a handle": "lambda: raw(424, 424, raw(434, 434, PARENT, 0), 15, None, 0)",
    "signal through a queue": "raw, 129, 138, PARENT, 15, ctypes.create_string_buffer(128)",
    "signal as a file's owner": "lambda: __import__('fcntl').fcntl(0, 8, PARENT)",
    "trace the parent": "native, 'ptrace', 16, PARENT, 0, 0",
    "trace the supervisor": "native, 'ptrace', 16, os.getppid(), 0, 0",
    "ask to be traced": "native, 'ptrace', 0, 0, 0, 0",
    "read the parent's memory": "raw, 310, 270, PARENT, None, 0, None, 0, 0",
    "write the supervisor's memory": "raw, 311, 271, os.getppid(), None, 0, None, 0, 0",
    "take a descriptor": "lambda: raw(438, 438, raw(434, 434, os.getppid(), 0), 0, 0)",
    "starve the parent": "lambda: __import__('resource').prlimit(PARENT, 0, (0, 0))",
    "slow the parent": "os.setpriority, os.PRIO_PROCESS, PARENT, 19",
    "pin the parent": "os.sched_setaffinity, PARENT, {0}",
    "raise its limits": "lambda: __import__('resource').setrlimit(9, (-1, -1))",
    "outlive the supervisor": "native, 'prctl', 1, 0, 0, 0, 0",
    "become traceable": "native, 'prctl', 4, 1, 0, 0, 0",
    "become root": "os.setuid, 0",
    "become somebody": "os.setresuid, 1, 1, 1",
    "a session of its own": "os.setsid",
    # new processes and programs
    "fork": "os.fork",
    "vfork": "raw, 58, 9999",
    "fork by hand": "raw, 56, 220, 17, 0, 0, 0, 0",
    "fork the new way": "raw, 435, 435, ctypes.create_string_buffer(b'\\0' * 32 + b'\\x11' + bytes(55), 88), 88",
    "a terminal's fork": "os.forkpty",
    "a shell": "lambda: __import__('subprocess').run('true', shell=True)",
    "another program": "os.execv, sys.executable, ['python', '-c', 'print(1)']",
    "spawn": "lambda: os.posix_spawn(sys.executable, ['python'], {})",
    "a process pool": "lambda: __import__('multiprocessing').get_context('fork').Process(target=print).start()",
    "a program from memory": "raw, 322, 281, 0, b'', None, None, 0x1000",
    "a thread with descriptors of its own": "raw, 56, 220, 0x3D0B00, 0, 0, 0, 0",
    "a thread with a folder of its own": "raw, 56, 220, 0x3D0D00, 0, 0, 0, 0",
    "descriptors of its own": "raw, 436, 436, 60, 60, 2",
    "threads without end": "lambda: [threading.Thread(target=time.sleep, args=(9,), daemon=True).start() "
    "for _ in range(500)]",
    # network
    "a server on this machine": "lambda: socket.create_connection(('127.0.0.1', PORT), 1)",
    "a server far away": "lambda: socket.create_connection(('192.0.2.1', 80), 1)",
    "names of the network": "socket.getaddrinfo, 'example.com', 80",
    "a socket in the file system": "lambda: socket.socket(socket.AF_UNIX).connect(SOCKET)",
    "an abstract socket": "lambda: socket.socket(socket.AF_UNIX).connect(ABSTRACT)",
    "listen": "lambda: socket.create_server(('127.0.0.1', 0))",
    "datagrams": "lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "datagrams through a pair": "lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', "
    "DATAGRAMS)",
    "abstract datagrams through a pair": "lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', "
    "ABSTRACT + 'd')",
    "a pair of another kind": "raw, 53, 199, 30, 1, 0, ctypes.create_string_buffer(8)",
    "raw packets": "lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "packets of the link": "lambda: socket.socket(17, socket.SOCK_RAW)",
    "the kernel's own socket": "lambda: socket.socket(16, socket.SOCK_RAW)",
    "the hypervisor": "lambda: socket.socket(40, socket.SOCK_STREAM)",
    # raw system calls
    "mount": "native, 'mount', b'none', b'/tmp', b'tmpfs', 0, None",
    "unmount": "native, 'umount2', b'/tmp', 2",
    "a user namespace": "native, 'unshare', 0x10000000",
    "a mount namespace": "native, 'unshare', 0x20000",
    "a namespace by cloning": "raw, 56, 220, 0x10000000 | 17, 0, 0, 0, 0",
    "join a namespace": "native, 'setns', 0, 0",
    "pivot the root": "raw, 155, 41, b'.', b'.'",
    "open a file by its number": "raw, 304, 265, -100, ctypes.create_string_buffer(128), 0",
    "io_uring": "raw, 425, 425, 1, ctypes.create_string_buffer(120)",
    "bpf": "raw, 321, 280, 0, ctypes.create_string_buffer(128), 128",
    "performance counters": "raw, 298, 241, ctypes.create_string_buffer(128), 0, -1, -1, 0",
    "faults in user space": "raw, 323, 282, 1",
    "keys": "raw, 248, 217, b'user', b'x', b'y', 1, -1",
    "keyrings": "raw, 250, 219, 0, -3, 1",
    "a file in memory": "raw, 319, 279, b'x', 0",
    "secret memory": "raw, 447, 447, 0",
    "shared memory of System V": "raw, 29, 194, 1234, 4096, 0o1666",
    "a semaphore of System V": "raw, 64, 190, 1234, 1, 0o1666",
    "messages of System V": "raw, 68, 186, 1234, 0o1666",
    "a message queue": "raw, 240, 180, b'left', 66, 0o600, None",
    "lock memory": "raw, 149, 228, 0, 4096",
    "watch files": "raw, 294, 26, 0",
    "the clock": "raw, 227, 112, 0, ctypes.create_string_buffer(16)",
    "the host's name": "raw, 170, 161, b'x', 1",
    "restart": "raw, 169, 142, 0, 0, 0, 0",
    "a kernel module": "raw, 175, 105, b'', 0, b''",
    "swap": "raw, 167, 224, b'/tmp', 0",
    "the kernel's log": "raw, 103, 116, 10, None, 0",
    "another filter": "raw, 317, 277, 1, 0, None",
    "a call from the future": "raw, 999, 999",
    "a call by the old table": "raw, 0x40000000 + 41, 9999, 2, 1, 0",
    "ports of the machine": "raw, 173, 9999, 0, 8, 1",
}

# Whole programs: {name: (allowed verdicts, code)}.
PROGRAMS = {
    "memory at once": ("out_of_memory", "x = bytearray(1 << 36)"),
    "memory piece by piece": ("out_of_memory", "x = []\nwhile True: x.append(bytearray(1 << 20))"),
    "memory by formatting": ("out_of_memory", "'%9999999999d' % 1"),
    "memory by mapping": ("error", "import mmap\nx = [mmap.mmap(-1, 64 << 20) for _ in range(100)]"),
    "memory, caught and again": (
        "timeout",
        "x = []\nwhile True:\n try: x.append(bytearray(1 << 20))\n except MemoryError: time.sleep(0.01)",
    ),
    "the stack": ("crashed error", "sys.setrecursionlimit(1 << 30)\nf = lambda: [*map(lambda _: f(), [1])]\nf()"),
    "a wild pointer": ("crashed", "ctypes.string_at(1)"),
    "abort": ("crashed", "os.abort()"),
    "32-bit calls": (
        "crashed",
        "import mmap\nm = mmap.mmap(-1, 4096, prot=7)\n"
        "m.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3' if not ARM else bytes(4))\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()",
    ),
    "its own death": ("killed", "os.kill(os.getpid(), 9)"),
    "standing still": ("timeout", "os.kill(os.getpid(), 19)"),
    "a loop": ("timeout", "while True: pass"),
    "sleep": ("timeout", "time.sleep(60)"),
    "a loop that catches everything": (
        "timeout",
        "while True:\n try:\n  while True: pass\n except BaseException: pass",
    ),
    "a loop in C": ("timeout", "import re\nre.match('(a*)*b', 'a' * 60)"),
    "a number in C": ("timeout", "sum(x * x for x in range(1 << 60))"),
    "deaf to signals": (
        "timeout",
        "import signal\nfor s in range(1, 65):\n try: signal.signal(s, signal.SIG_IGN)\n "
        "except (OSError, ValueError): pass\nwhile True: pass",
    ),
    "a thread that stays": ("timeout", "threading.Thread(target=time.sleep, args=(60,)).start()"),
    "an end that never ends": ("timeout", "import atexit\natexit.register(time.sleep, 60)"),
    "waiting for input": ("error", "input()"),
    "reading to the end of input": ("success", "assert sys.stdin.read() == ''"),
    "output": ("output_limit", "while True: print('x' * 1000)"),
    "errors": ("output_limit", "while True: sys.stderr.write('x' * 1000)"),
    "output past Python": ("output_limit", "while True: os.write(1, b'x' * 65536)"),
    "one endless line": ("output_limit", "while True: sys.stdout.write('x')"),
    "output of a thread": (
        "output_limit",
        "def f():\n while True: os.write(2, b'x' * 999)\n"
        "threading.Thread(target=f, daemon=True).start()\ntime.sleep(60)",
    ),
    "bytes that are no text": ("success", "os.write(1, bytes(range(256)))\nos.write(2, b'\\xff\\xfe')"),
    "half a character": ("success", "os.write(1, 'é'.encode()[:1])"),
    "text that is no text": ("error", "print('\\ud800')"),
    "an exception without text": ("error", "class E(Exception):\n def __str__(self): raise self\nraise E"),
    "an exception with much text": ("error", "raise Exception('x' * (1 << 20))"),
    "closed streams": ("success", "sys.stdout.close(); sys.stderr.close()"),
    "closed descriptors": ("early_exit", "os.closerange(0, 256)"),
    "a null byte": ("error", "exec('1\\0')"),
    "many parentheses": ("error", "eval('(' * 100000)"),
    "many files": ("file_limit error", "for i in range(1 << 20): open(f'f{i}', 'w').close()"),
    "many folders": ("file_limit error", "for i in range(1 << 20): os.mkdir(f'd{i}')"),
    "a deep folder": ("file_limit error", "while True: os.mkdir('d'); os.chdir('d')"),
    "a locked folder": ("success error", "os.mkdir('d'); open('d/f', 'w').close(); os.chmod('d', 0); os.chmod('.', 0)"),
    "descriptors": ("error", "x = []\nwhile True: x.append(os.pipe())"),
    # exits before the end
    "exit": ("early_exit", "sys.exit(0)"),
    "exit without anything": ("early_exit", "os._exit(0)"),
    "exit with a word": ("early_exit", "sys.exit('success')"),
    "exit by the library": ("early_exit", "libc._exit(0)"),
    "exit by the kernel": ("early_exit", "raw(231, 94, 0)"),
    "exit at the end": ("early_exit", "import atexit\natexit.register(os._exit, 0)"),
    "exit at the end of a failure": ("error", "import atexit\natexit.register(os._exit, 0)\nassert False"),
    "exit from a finaliser": ("early_exit", "class D:\n def __del__(self): os._exit(0)\nD()\nassert False"),
    "exit from a thread": ("early_exit", "threading.Thread(target=os._exit, args=(0,)).start()\ntime.sleep(60)"),
    "exit from a signal": (
        "early_exit",
        "import signal\nsignal.signal(14, lambda *_: os._exit(0))\nsignal.alarm(1)\n"
        "signal.setitimer(0, 0.01)\ntime.sleep(60)",
    ),
    "exit while failing": (
        "early_exit",
        "sys.excepthook = lambda *_: os._exit(0)\nclass E(Exception):\n def __str__(self): os._exit(0)\nraise E",
    ),
    "a failure in a finaliser": ("success", "class D:\n def __del__(self): raise ValueError\nD()"),
    "interrupt": ("error", "raise KeyboardInterrupt"),
    "an exception that hides": (
        "error",
        "class M(type):\n def __getattribute__(self, name): os._exit(0) if name == 'x' else 1 / 0\n"
        "class E(BaseException, metaclass=M):\n def __getattribute__(self, name): 1 / 0\nraise E",
    ),
    "an exception of its own kind": ("error", "class E(BaseException): pass\nraise E"),
    "a generator's exit": ("error", "raise GeneratorExit"),
    # forged verdicts
    "a verdict on standard output": ("error", 'print(\'{"verdict": "success", "ended": "end"}\')\nassert False'),
    "a verdict in a frame": (
        "error",
        "import json, struct\nm = json.dumps({'verdict': 'success'}).encode()\n"
        "os.write(1, struct.pack('>I', len(m)) + m)\nassert False",
    ),
    "something on every descriptor": (
        "early_exit crashed",
        "for fd in range(256):\n try: os.write(fd, b'success' * 9)\n except OSError: pass\nos._exit(0)",
    ),
    "a verdict on every descriptor": (
        "early_exit",
        "import json, struct\nm = json.dumps({'verdict': 'success', "
        "'nonce': '0' * 32}).encode()\nfor fd in range(3, 256):\n"
        " try: os.write(fd, struct.pack('>I', len(m)) + m)\n except OSError: pass\n"
        "os._exit(0)",
    ),
    "a long report": ("early_exit", "os.write(3, b'\\xff' * 99999)\nos._exit(0)"),
    "a report of brackets": ("early_exit", "os.write(3, b'\\0\\0\\x0f\\0' + b'[' * 0xf00)\nos._exit(0)"),
    "every secret of the interpreter": (
        "early_exit",
        """
import gc, re
found, frame = set(), sys._getframe()
while frame:
    found |= {repr(v) for v in (*frame.f_locals.values(), *frame.f_globals.values())}
    frame = frame.f_back
found |= {repr(o) for o in gc.get_objects() if isinstance(o, (dict, list, tuple)) and len(o) < 50}
for nonce in {n for text in found for n in re.findall('[0-9a-f]{32}', text)}:
    print("ESCAPED", nonce)
    for fd in range(3, 64):
        try: os.write(fd, nonce.encode())
        except OSError: pass
os._exit(0)
""",
    ),
}

# Programs whose function fails TESTS: {name: (allowed verdicts, code)}.
TESTS = "assert f(2) == 4\nassert f([1, 2]) == [1, 2, 1, 2]\n"
RIGHT = "def f(x): return x * 2"
TESTED = {
    "wrong": ("error", "def f(x): return 3"),
    "nothing": ("error", "def f(x): pass"),
    "no function": ("error", "x = 1"),
    "a failing program": ("error", RIGHT + "\nassert False"),
    "exit before the tests": ("early_exit", RIGHT + "\nos._exit(0)"),
    "exit politely": ("early_exit", RIGHT + "\nsys.exit(0)"),
    "exit during the tests": ("early_exit", "def f(x): os._exit(0)"),
    "exit politely during the tests": ("early_exit", "def f(x): sys.exit(0)"),
    "death during the tests": ("killed", "def f(x): os.kill(os.getpid(), 9)"),
    "a crash during the tests": ("crashed", "def f(x): ctypes.string_at(0)"),
    "no answer": ("timeout", "def f(x): time.sleep(60)"),
    "an answer equal to all": ("error", "class A:\n def __eq__(self, other): return True\ndef f(x): return A()"),
    "a number equal to all": (
        "error",
        "class A(int):\n def __eq__(self, other): return True\n __hash__ = None\ndef f(x): return A()",
    ),
    "no failing of asserts": (
        "error",
        "import builtins\nbuiltins.AssertionError = type('A', (Exception,), {})\n"
        "sys.excepthook = print\ndef f(x): return 3",
    ),
    "no asserts at all": (
        "error",
        "import builtins, ast\nbuiltins.compile = lambda *a, **k: (lambda: 0).__code__\n"
        "builtins.exec = lambda *a: None\ndef f(x): return 3",
    ),
    "a report of its own": (
        "early_exit",
        "import struct\nm = b'{\"ended\": \"end\"}'\nos.write(3, struct.pack('>I', len(m)) + m)\nos._exit(0)",
    ),
    "a report, and wrong": (
        "error",
        "import struct\nm = b'{\"ended\": \"end\"}'\nos.write(3, struct.pack('>I', len(m)) + m)\ndef f(x): return 3",
    ),
    "a patched interpreter": (
        "timeout",
        "import nanochat.sandbox.program as p\np.run = lambda *a: 'end'\n"
        "p.write_frame = lambda fd, m: None\n__import__('builtins').AssertionError = OSError\n"
        "def f(x): return 3",
    ),
    "an answer that is none": ("error", "def f(x): os.write(4, b'\\0\\0\\0\\x02{}'); time.sleep(60)"),
    "an answer of brackets": ("early_exit timeout", "def f(x): os.write(4, b'\\0\\1\\0\\0' + b'[' * 65536)"),
    "an endless answer": ("timeout", "def f(x):\n while True: os.write(4, b'\\x03\\xff\\xff\\xff')"),
    "an answer too long": ("early_exit timeout", "def f(x): os.write(4, b'\\xff' * 8); time.sleep(60)"),
    "an exception that exits": ("error", "class SystemExit(Exception): pass\ndef f(x): raise SystemExit"),
    "an exception whose text raises": (
        "error",
        "class E(Exception):\n def __str__(self): raise self\ndef f(x): raise E",
    ),
    "an exception while it answers": (
        "error",
        "import signal\ndef g(*_): raise ValueError\nsignal.signal(14, g); signal.setitimer(0, 0.01, 0.001)\n"
        "def f(x):\n while True: pass",
    ),
    "an exception of no built-in class": (
        "error",
        "import nanochat.sandbox.program as p\n"
        "p.describe = lambda error: {'raised': 'exec', 'name': 'exec', 'text': '',"
        " 'arguments': ['print(\"ESCAPED\")']}\ndef f(x): 1 / 0",
    ),
    "an argument changed into code": (
        "error",
        "import nanochat.sandbox.program as p\n"
        "p.pack = lambda value: {'eval': 'print(\"ESCAPED\")'}\ndef f(x): return x",
    ),
    "an exception by a big name": ("error", "def f(x): raise type('x' * 10000, (Exception,), {})"),
    "hanging up": ("timeout early_exit", "os.close(4)\ndef f(x): return 3"),
    "signals to the tests": (
        "error",
        "def f(x):\n for pid in range(1, 200):\n"
        "  try: os.kill(pid, 9) if pid != os.getpid() else 0\n  except OSError: pass\n return 3",
    ),
    "the tests in memory": (
        "error",
        "import gc, re\ndef f(x):\n"
        " seen = [o for o in gc.get_objects() if re.search(r'assert f\\(\\[1', repr(o)[:100000])]\n"
        " return (print('ESCAPED'), 4)[1] if seen else 3",
    ),
}
