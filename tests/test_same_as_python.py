"""A program passes in the sandbox exactly if it passes in plain Python, which is the oracle here."""

import functools
import subprocess
import sys
import tempfile

import pytest

from nanochat.execution import execute_code

PROGRAMS = {
    # exceptions and exits
    "a failed assert": "assert False",
    "a generator's exit": "raise GeneratorExit",
    "a group": "raise ExceptionGroup('x', [ValueError(1)])",
    "a thread's exception": "import threading\n"
    "t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join(); print(1)",
    "an exit function's exception": "import atexit\natexit.register(lambda: 1 / 0); print(1)",
    "an exit function's exit": "import atexit, sys\natexit.register(sys.exit, 3); print(1)",
    "a finalizer's exception": "class D:\n def __del__(self): raise ValueError\nD(); print(1)",
    "an exit that is caught": "try: exit(3)\nexcept SystemExit as e: print(e.code)",
    "a thread's exit": "import sys, threading\nt = threading.Thread(target=sys.exit); t.start(); t.join(); print(1)",
    "a text that raises": "class E(Exception):\n def __str__(self): raise self\nraise E",
    "a traceback that raises": "class E(Exception):\n __traceback__ = property(lambda self: 1 / 0)\nraise E",
    "an exit code that raises": "class E(SystemExit):\n code = property(lambda self: 1 / 0)\nraise E",
    "a class that lies": "class E(Exception):\n __class__ = property(lambda self: SystemExit)\nraise E",
    "a class that hides": "class M(type):\n def __getattribute__(self, name): raise OSError(name)\n"
    "class E(Exception, metaclass=M):\n def __getattribute__(self, name): raise OSError(name)\nraise E",
    "an interrupt": "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT); time.sleep(5)",
    "a signal": "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM); time.sleep(5)",
    # standard streams
    "a surrogate on stdout": "print('\\ud800')",
    "a surrogate on stderr": "import sys; print('\\ud800', file=sys.stderr)",
    "a byte that is no text": "print('\\udc80')",
    "errors of the streams": "import sys; print(sys.stdin.errors, sys.stdout.errors, sys.stderr.errors)",
    "encodings": "import sys; print(sys.stdout.encoding, sys.getdefaultencoding(), sys.getfilesystemencoding())",
    "no input": "import sys; print(repr(sys.stdin.read()), sys.stdin.isatty(), sys.stdout.isatty())",
    "input": "try: input()\nexcept EOFError: print('end')",
    "a stream that cannot be flushed": "import sys\nclass W:\n def write(self, text): pass\n"
    " def flush(self): 1 / 0\nsys.stdout = W(); print(1)",
    "text left for a closed descriptor": "import os, sys\nsys.stdout.write('x'); os.close(1)",
    "a closed stream": "import sys; sys.stdout.close()",
    "no stream": "import sys; sys.stdout = None; print(1)",
    "another stream": "import io, sys; sys.stdout = io.StringIO(); print(1)",
    # the end
    "a finalizer at the end": "import os\nclass D:\n def __del__(self): print('bye', bool(os))\n_d = D()\nprint(1)",
    "a cycle at the end": "class D:\n def __del__(self): print('bye')\nd = D(); d.d = d; del d\nprint(1)",
    "a weak reference's finalizer": "import weakref\nclass A: pass\n"
    "a = A(); weakref.finalize(a, print, 'bye')\nprint(1)",
    "threads before exit functions": "import atexit, threading, time\natexit.register(print, 'atexit')\n"
    "threading.Thread(target=lambda: time.sleep(0.05) or print('late')).start(); print(1)",
    "a daemon": "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start(); print(1)",
    # the module
    "names": "print(__name__, __doc__, __package__, __spec__, __builtins__, __annotations__)",
    "names added by site": "print(quit, exit, help, copyright)",
    "itself": "x = 5\nimport __main__; print(__main__.x)",
    "without itself": "import sys\ndel sys.modules['__main__']; print(1)",
    "annotations": "x: int = 3\ndef f(x: int) -> str: pass\nprint(f.__annotations__, __annotations__)",
    "the future": "from __future__ import annotations\ndef f(x: nonsense): pass\nprint(f.__annotations__)",
    "pickle": "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))))",
    "a data class": "from dataclasses import dataclass\n@dataclass\nclass A:\n x: int\nprint(A(1))",
    "a unit test": "import unittest\nclass T(unittest.TestCase):\n"
    " def test(self): self.assertEqual(1, 2)\nunittest.main()",
    "a doctest": "def f(x):\n '''\n >>> f(1)\n 2\n '''\n return x + 1\nimport doctest; print(doctest.testmod())",
    "surrogates in the source": "print(len('\ud83d\ude00'))",
    "a carriage return in the source": "print(1)\rprint(2)",
    # depth and threads
    "the deepest recursion": "def f(n): return 0 if n == 0 else 1 + f(n - 1)\nd = 0\ntry:\n while True: f(d); d += 1\n"
    "except RecursionError: print(d > 995)",
    "recursion through C": "f = lambda n: 0 if n == 0 else sum(map(f, [n - 1])) + 1\nprint(f(300))",
    "recursion through C in a thread": "import threading\nf = lambda n: 0 if n == 0 else sum(map(f, [n - 1])) + 1\n"
    "t = threading.Thread(target=lambda: print(f(300))); t.start(); t.join()",
    "a thread with a large stack": "import sys, threading\n"
    "threading.stack_size(64 << 20); sys.setrecursionlimit(10**5)\n"
    "def f(n): return 0 if n == 0 else 1 + f(n - 1)\n"
    "t = threading.Thread(target=lambda: print(f(20000))); t.start(); t.join()",
    "64 threads": "import threading\nbarrier = threading.Barrier(65, timeout=20)\n"
    "ts = [threading.Thread(target=barrier.wait) for _ in range(64)]\nfor t in ts: t.start()\n"
    "barrier.wait(); print(barrier.broken)\nfor t in ts: t.join()",
    "64 threads that allocate": "import threading\nbarrier = threading.Barrier(65, timeout=20)\n"
    "def f(): x = [bytearray(200000) for _ in range(5)], [str(i) for i in range(500)]; barrier.wait()\n"
    "for _ in range(64): threading.Thread(target=f).start()\nbarrier.wait(); print(1)",
    "a thousand threads, one after another": "import threading\nfor _ in range(1000):\n"
    " t = threading.Thread(target=len, args=('',)); t.start(); t.join()\nprint(1)",
    # the library
    "asyncio": "import asyncio\nasync def f(x): await asyncio.sleep(0.001); return x\n"
    "async def g(): print(await asyncio.gather(f(1), f(2)))\nasyncio.run(g())",
    "a pool of threads": "from concurrent.futures import ThreadPoolExecutor as P\n"
    "with P(8) as p: print(*p.map(str, range(5)))",
    "a pair of sockets": "import socket\na, b = socket.socketpair(); a.sendall(b'hi'); print(b.recv(2))",
    "a database in memory": "import sqlite3; print(sqlite3.connect(':memory:').execute('select 1').fetchall())",
    "the user's name": "import getpass; print(bool(getpass.getuser()))",
    "a time zone": "import zoneinfo; print(zoneinfo.ZoneInfo('Europe/Berlin'))",
}

# {name: (program with the function f, tests of it)}
TESTED = {
    "right": ("def f(x): return x * 2", "assert f(2) == 4"),
    "wrong": ("def f(x): return 3", "assert f(2) == 4"),
    "a pair of surrogates": ("def f(x): return '\\ud83d\\ude00'", "assert f(1) == '\\U0001F600'"),
    "surrogates there and back": ("f = lambda x: x", "x = '\\ud83d\\ude00 \\udc80 \\U0001F600'; assert f(x) == x"),
    "surrogates as keys": ("def f(x): return {'\\ud83d\\ude00': 1}", "assert f(1)['\\U0001F600'] == 1"),
    # exceptions
    "an end of iteration": ("def f(x): raise StopIteration", "assert list(map(f, [1, 2])) == []"),
    "its own end of iteration": (
        "class StopIteration(Exception): pass\ndef f(x): raise StopIteration",
        "assert list(map(f, [1, 2])) == []",
    ),
    "an end of iteration in a generator": ("def f(x): raise StopIteration", "assert [*(f(i) for i in [1])] == []"),
    "the name of a built-in": (
        "E = type('KeyError', (Exception,), {})\ndef f(x): raise E",
        "try: f(1)\nexcept KeyError: pass",
    ),
    "a kind of a built-in": ("class E(KeyError): pass\ndef f(x): raise E", "try: f(1)\nexcept LookupError: pass"),
    "the name of a class": (
        "class E(Exception): pass\ndef f(x): raise E(3)",
        "try: f(1)\nexcept Exception as e: assert (type(e).__name__, e.args, str(e)) == ('E', (3,), '3')",
    ),
    "a text of its own": (
        "class E(Exception):\n def __str__(self): return 'text'\ndef f(x): raise E(3)",
        "try: f(1)\nexcept Exception as e: assert str(e) == 'text'",
    ),
    "a missing key": ("def f(x): return {}[x]", "try: f('a')\nexcept KeyError as e: assert str(e) == repr('a')"),
    "bytes that are no text": ("def f(x): return x.decode()", "try: f(b'\\xff')\nexcept UnicodeError as e: print(e)"),
    "a missing file": ("f = open", "try: f('/missing')\nexcept FileNotFoundError as e: assert e.errno == 2"),
    "an interrupt": ("def f(x): raise KeyboardInterrupt", "try: f(1)\nexcept Exception: pass"),
    "an interrupt that is caught": ("def f(x): raise KeyboardInterrupt", "try: f(1)\nexcept KeyboardInterrupt: pass"),
    "another base": ("class E(BaseException): pass\ndef f(x): raise E", "try: f(1)\nexcept Exception: pass"),
    "a generator's exit": ("def f(x): raise GeneratorExit", "def g(): yield f(1)\nassert list(g()) == []"),
    "an exit": ("def f(x): raise SystemExit(3)", "try: f(1)\nexcept SystemExit as e: assert e.code == 3"),
    "an exit by a kind of it": ("class E(SystemExit): pass\ndef f(x): raise E", "try: f(1)\nexcept Exception: pass"),
    "a group": ("def f(x): raise ExceptionGroup('x', [KeyError()])", "try: f(1)\nexcept Exception: pass"),
    "a text that raises": (
        "class E(ValueError):\n def __str__(self): 1 / 0\ndef f(x): raise E",
        "try: f(1)\nexcept ValueError: pass",
    ),
    "a text that raises, uncaught": ("class E(ValueError):\n def __str__(self): 1 / 0\ndef f(x): raise E", "f(1)"),
    "arguments that raise": (
        "class E(KeyError):\n args = property(lambda self: 1 / 0)\ndef f(x): raise E",
        "try: f(1)\nexcept KeyError: pass",
    ),
    "a class that hides": (
        "class M(type):\n def __getattribute__(self, name): 1 / 0\n __hash__ = None\n"
        "class E(KeyError, metaclass=M): pass\ndef f(x): raise E",
        "try: f(1)\nexcept KeyError: pass",
    ),
    "too deep": ("def f(x): return f(x)", "try: f(1)\nexcept RecursionError: pass"),
    "too large": ("def f(x): return [0] * (1 << 60)", "try: f(1)\nexcept MemoryError: pass"),
    # names
    "no function": ("x = 1", "try: f(1)\nexcept NameError: pass"),
    "no function, and any error will do": ("x = 1", "try: f(1)\nexcept TypeError: pass"),
    "a function that is replaced": (
        "def f(x):\n global f\n f = lambda x: 2\n return 1",
        "assert (f(0), f(0)) == (1, 2)",
    ),
    "a function that calls itself": (
        "def f(n): return 1 if n == 0 else n * f(n - 1)",
        "assert f(20) == 2432902008176640000",
    ),
    # arguments changed in place
    "a list that is sorted": ("def f(x): x.sort()", "x = [3, 1]; f(x); assert x == [1, 3]"),
    "a list that must not change": ("def f(x): return x.pop()", "x = [3, 1]; f(x); assert x == [3, 1]"),
    "a dict that changes": ("def f(x, y): y[x] = 1", "y = {2: 2}; f(1, y=y); assert y == {2: 2, 1: 1}"),
    "a set that changes": ("def f(x): x.clear()", "x = {1}; f(x); assert not x"),
    "an object in a list": ("def f(x): x.append(object())", "x = [1]; f(x); assert x == [1]"),
    "a list in a list": ("def f(x): x[0].append(1)", "x = [[0]]; f(x); assert x == [[0, 1]]"),
    "a list that an exception leaves": (
        "def f(x): x.append(1); 1 / 0",
        "x = []\ntry: f(x)\nexcept: pass\nassert x == [1]",
    ),
    # values
    "types": (
        "def f(x): return x",
        "import collections, decimal, fractions\n"
        "for x in (1 << 5000, -1.5, float('inf'), 1j, b'a', bytearray(b'a'), (1, (2,)), {(1,): {2}}, frozenset({1}),"
        " None, decimal.Decimal('1.50'), fractions.Fraction(1, 3), collections.Counter('aab'),"
        " collections.deque([1], 3), collections.OrderedDict(a=1, b=2)):\n"
        " assert f(x) == x and type(f(x)) is type(x) and repr(f(x)) == repr(x), x",
    ),
    "a counter": ("from collections import Counter as f", "assert f('aab') == {'a': 2, 'b': 1}"),
    "the order of keys": ("def f(x): return dict(reversed(x.items()))", "assert [*f({1: 2, 3: 4})] == [3, 1]"),
    "not a number": ("f = float", "x = f('nan'); assert x != x"),
    "a tuple is no list": ("def f(x): return (1, 2)", "assert f(1) == [1, 2]"),
}


@functools.cache
def plain(code: str) -> tuple[bool, str]:
    """(whether it ran to its end without an error, its output) in plain Python."""
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "USER": "me"}
    with tempfile.NamedTemporaryFile(suffix=".py") as file:
        file.write(code.encode("utf-8", "surrogatepass") + b"\n__import__('os').write(2, b'THE END')")
        file.flush()
        done = subprocess.run(
            [sys.executable, "-s", file.name], stdin=subprocess.DEVNULL, capture_output=True, env=environment
        )
    return done.returncode == 0 and b"THE END" in done.stderr, done.stdout.decode("utf-8", "replace")


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(level: str, name: str) -> None:
    result = execute_code(PROGRAMS[name], timeout=20, level=level)
    assert (result.success, result.stdout) == plain(PROGRAMS[name]), result


@pytest.mark.parametrize("name", TESTED)
def test_programs_with_tests(level: str, name: str) -> None:
    code, tests = TESTED[name]
    result = execute_code(code, timeout=20, tests=tests, entry_point="f", level=level)
    assert (result.success, result.stdout) == plain(f"{code}\n{tests}"), result
