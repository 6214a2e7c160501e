"""The processes that run a program and its tests, inside the sandbox. Standard library only.

Both are forked and restricted by nanochat/sandbox/child.py. Descriptor 3 carries the request from it and the report
back. With tests, descriptor 4 connects the two processes: the tests call the function in the program's process and
check the results in their own, where none of the program's code runs.
"""

import ast
import builtins
import contextlib
import linecache
import os
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

from nanochat.sandbox.wire import Gone, pack, read_frame, unpack, write_frame

REPORT, CALLS = 3, 4


def run_requests(interactive: bool) -> None:
    """Run requests and report how they ended: one, or if interactive until the process is killed. Never returns.

    A program can forge this report, but not the verdict of its tests, and not the nonce, which was never in this
    process.
    """
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    cell = 0
    while True:
        request = read_frame(REPORT)
        cell += 1
        name = f"<cell {cell}>" if interactive else f"<{request['name']}>"
        if request["name"] == "tests":
            module.__dict__[request["entry_point"]] = make_proxy(request["entry_point"])
        ended = run(request["code"], name, module.__dict__, interactive)
        if request["name"] == "program" and request["entry_point"] and ended == "end":
            serve_calls(module.__dict__.get(request["entry_point"]))
        if not interactive and ended == "end":
            ended = shut_down()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # a program may have closed or replaced it
                stream.flush()
        write_frame(REPORT, {"ended": ended})
        if not interactive or ended == "exit":
            os._exit(0)


def run(code: str, name: str, variables: dict[str, Any], interactive: bool) -> str:
    """Run `code`. Returns "end" if it ran to its end, else "exit", "memory", "gone" or "error" (traceback printed)."""
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    try:
        if name == "<tests>":
            read_frame(CALLS)  # the program ran to its end and serves calls
        for compiled in parts(code, name) if interactive else [compile(code, name, "exec")]:
            exec(compiled, variables)
    except SystemExit as stop:
        if stop.code is not None and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
        return "exit"
    except MemoryError:
        return "memory"
    except Gone:  # the program's process died during a call
        return "gone"
    except BaseException as error:
        print_error(error, name)
        return "error"
    return "end"


def parts(code: str, name: str) -> list[types.CodeType]:
    """The compiled code; a final expression apart, whose value is printed as by the interactive interpreter."""
    tree = ast.parse(code, name)
    if not tree.body or not isinstance(tree.body[-1], ast.Expr):
        return [compile(tree, name, "exec")]
    last = ast.Interactive([tree.body.pop()])
    return [compile(tree, name, "exec"), compile(last, name, "single")]


def print_error(error: BaseException, name: str) -> None:
    """Print the traceback, starting at the program's own first frame."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != name:
        trace = trace.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error, trace, limit=-20))
        sys.stderr.write(text if len(text) < 8000 else f"{text[:4000]}\n[...]\n{text[-4000:]}")
    except BaseException:  # str(error) fails, or the program tampered with traceback
        with contextlib.suppress(BaseException):
            os.write(2, f"{type(error).__name__}\n".encode("utf-8", "backslashreplace"))


def shut_down() -> str:
    """Finish as an interpreter does: wait for threads, run atexit functions. Returns "end" or "error"."""
    try:
        if threading := sys.modules.get("threading"):
            threading._shutdown()
        if atexit := sys.modules.get("atexit"):
            atexit._run_exitfuncs()
    except BaseException as error:
        print_error(error, "")
        return "error"
    return "end"


# ---------------------------------------------------------------------------------------------------
# Calls from the tests to the program


def serve_calls(function: Any) -> None:
    """In the program's process: serve calls of the tests until they close the channel."""
    write_frame(CALLS, {"ready": True})
    with contextlib.suppress(Gone):
        while True:
            arguments, named = unpack(read_frame(CALLS))
            try:
                answer = {"value": pack(function(*arguments, **named))}
            except SystemExit:
                os._exit(0)
            except BaseException as error:
                answer = {"raised": type(error).__name__[:100], "text": str(error)[:1000]}
            write_frame(CALLS, answer)


def make_proxy(name: str) -> Callable[..., Any]:
    """A function that calls the program's function of that name in its process and returns the result."""

    def proxy(*arguments: Any, **named: Any) -> Any:
        write_frame(CALLS, pack((arguments, named)))
        answer = read_frame(CALLS)
        if "value" in answer:
            return unpack(answer["value"])
        kind = getattr(builtins, str(answer["raised"]), None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            kind = RuntimeError
        raise kind(str(answer["text"]))

    proxy.__name__ = name
    return proxy
