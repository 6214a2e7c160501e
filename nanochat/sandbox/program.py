"""Inside the sandbox: the process that runs a program, and the one that runs its tests. Standard library only.

Both are children of nanochat/sandbox/child.py and already locked in when they come here. Descriptor 3 leads to it:
a request comes, a report goes back. With tests, descriptor 4 joins the two processes, so that the tests call the
program's function where it lives and judge what comes back in memory that no line of the program ever touched.
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
    """Run what is asked for and report how it ended: once, or in an interactive process until it is ended.

    The last thing this process does; a program finds nothing here that could vouch for it but this report,
    and the nonce that the answer is sealed with was never in this process.
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
            module.__dict__[request["entry_point"]] = make_stand_in(request["entry_point"])
        ended = run(request["code"], name, module.__dict__, interactive)
        if request["name"] == "program" and request["entry_point"] and ended == "end":
            answer_calls(module.__dict__.get(request["entry_point"]))
        if not interactive and ended == "end":
            ended = wind_up()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # a program may have closed or replaced it
                stream.flush()
        write_frame(REPORT, {"ended": ended})
        if not interactive or ended == "exit":
            os._exit(0)


def run(code: str, name: str, variables: dict[str, Any], interactive: bool) -> str:
    """Run `code`; "end" if it came to its end, else "exit", "memory", "gone" or "error" (traceback printed)."""
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    try:
        if name == "<tests>":
            read_frame(CALLS)  # the program came to its end and answers calls
        for compiled in parts(code, name) if interactive else [compile(code, name, "exec")]:
            exec(compiled, variables)
    except SystemExit as stop:
        if stop.code is not None and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
        return "exit"
    except MemoryError:
        return "memory"
    except Gone:  # the program's process, while its tests called it
        return "gone"
    except BaseException as error:
        print_error(error, name)
        return "error"
    return "end"


def parts(code: str, name: str) -> list[types.CodeType]:
    """All but the last statement, and the last, whose value is shown as the interactive interpreter shows it."""
    tree = ast.parse(code, name)
    if not tree.body or not isinstance(tree.body[-1], ast.Expr):
        return [compile(tree, name, "exec")]
    last = ast.Interactive([tree.body.pop()])
    return [compile(tree, name, "exec"), compile(last, name, "single")]


def print_error(error: BaseException, name: str) -> None:
    """The traceback from the program's own first line on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != name:
        trace = trace.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error, trace, limit=-20))
        sys.stderr.write(text if len(text) < 8000 else f"{text[:4000]}\n[...]\n{text[-4000:]}")
    except BaseException:  # an exception whose text cannot be made, or a traceback module that was tampered with
        with contextlib.suppress(BaseException):
            os.write(2, f"{type(error).__name__}\n".encode("utf-8", "backslashreplace"))


def wind_up() -> str:
    """What an interpreter does at its end: wait for threads, run what was registered."""
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
# Tests apart from the program


def answer_calls(function: Any) -> None:
    """In the program's process: carry out the tests' calls until they hang up."""
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


def make_stand_in(name: str) -> Callable[..., Any]:
    """A function that sends its arguments to the program's process and returns what its function returned."""

    def stand_in(*arguments: Any, **named: Any) -> Any:
        write_frame(CALLS, pack((arguments, named)))
        answer = read_frame(CALLS)
        if "value" in answer:
            return unpack(answer["value"])
        kind = getattr(builtins, str(answer["raised"]), None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            kind = RuntimeError
        raise kind(str(answer["text"]))

    stand_in.__name__ = name
    return stand_in
