"""The processes that run a program and its tests, inside the sandbox. Standard library only.

Both are forked and restricted by nanochat/sandbox/child.py. Descriptor 3 carries the request from it and the report
back. With tests, descriptor 4 connects the two processes: the tests call the function in the program's process and
check the results in their own, where none of the program's code runs.
"""

import ast
import builtins
import contextlib
import gc
import linecache
import os
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

from nanochat.sandbox.wire import Gone, pack, read_frame, unpack, write_frame

REPORT, CALLS = 3, 4
EXCEPTIONS = {
    name: kind for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)
}


def run_requests(interactive: bool) -> None:
    """Run requests and report how they ended: one, or if interactive until the process is killed. Never returns.

    A program can forge this report, but not the verdict of its tests, and not the nonce, which was never in this
    process.
    """
    module = types.ModuleType("__main__")
    module.__dict__.update(__builtins__=builtins, __annotations__={})
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
            serve_calls(request["entry_point"], module.__dict__)
        if not interactive and ended == "end":
            ended = shut_down(module.__dict__)
        flush()
        with contextlib.suppress(Gone):  # it closed the channel
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
        with contextlib.suppress(BaseException):  # it may be of any class
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
    try:
        trace = BaseException.__dict__["__traceback__"].__get__(error)  # its class may hide it
        while trace is not None and trace.tb_frame.f_code.co_filename != name:
            trace = trace.tb_next
        text = "".join(traceback.format_exception(type(error), error, trace, limit=-20))
        sys.stderr.write(text if len(text) < 8000 else f"{text[:4000]}\n[...]\n{text[-4000:]}")
    except BaseException:  # str(error) fails, or the program tampered with traceback
        with contextlib.suppress(BaseException):
            os.write(2, f"{type(error).__name__}\n".encode("utf-8", "backslashreplace"))


def shut_down(variables: dict[str, Any]) -> str:
    """Finish as Python does: wait for threads, run atexit functions and finalizers. Returns "end" or "error"."""
    try:
        if threading := sys.modules.get("threading"):
            threading._shutdown()
        if atexit := sys.modules.get("atexit"):
            atexit._run_exitfuncs()
        flushed = flush()
        # Daemon threads would stumble over missing variables; they end finalizers, too.
        names = [name for name in variables if name != "__builtins__" and len(sys._current_frames()) == 1]
        for name in sorted(names, key=lambda name: not name.startswith("_") or name.startswith("__")):
            variables[name] = None
        gc.collect()
        return "end" if flush() and flushed else "error"
    except BaseException as error:
        print_error(error, "")
        return "error"


def flush() -> bool:
    """Flush the standard streams, which a program may have closed or replaced; False if that fails."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
    except BaseException:
        return False
    return True


# ---------------------------------------------------------------------------------------------------
# Calls from the tests to the program


def serve_calls(name: str, variables: dict[str, Any]) -> None:
    """In the program's process: serve calls of the tests until they close the channel."""
    with contextlib.suppress(Gone):
        write_frame(CALLS, {"ready": True})
        while True:
            request = read_frame(CALLS)
            arguments = unpack(request)
            try:
                answer = {"value": pack(eval(name, variables)(*arguments[0], **arguments[1]))}
            except BaseException as error:
                answer = describe(error)
            try:
                after = pack(arguments)
                answer["changed"] = None if after == request else after
            except TypeError as error:
                answer = describe(error)
            write_frame(CALLS, answer)


def describe(error: BaseException) -> dict[str, Any]:
    """What `imitate` needs: the nearest built-in class; its own name, text and arguments as far as they can be had."""
    bases = type.mro(type(error))  # its class may hide them
    kind = next(name for base in bases for name, kind in EXCEPTIONS.items() if kind is base)
    answer: dict[str, Any] = {"raised": kind, "name": kind, "text": "", "arguments": []}
    with contextlib.suppress(BaseException):
        answer["name"] = type(error).__name__[:100]
        answer["text"] = str(error)[:1000]
        answer["arguments"] = [answer["text"]]
        answer["arguments"] = pack(list(error.args))
    return answer


def imitate(answer: dict[str, Any]) -> BaseException:
    """The exception to raise in the tests for one that the program raised. `answer` may be forged."""
    kind, name, text = EXCEPTIONS[answer["raised"]], answer["name"], answer["text"]
    if name != kind.__name__ and name.isidentifier():
        kind = type(name, (kind,), {"__module__": "__main__", "__str__": lambda self: text})
    try:
        return kind(*unpack(answer["arguments"]))
    except TypeError:  # a group has exceptions as arguments
        return (Exception if issubclass(kind, Exception) else BaseException)(text)


def make_proxy(name: str) -> Callable[..., Any]:
    """A function that calls the program's function of that name in its process and returns the result.

    Lists, dicts and sets among the arguments change as the program changes its copies.
    """

    def proxy(*arguments: Any, **named: Any) -> Any:
        write_frame(CALLS, pack([arguments, named]))
        answer = read_frame(CALLS)
        if answer.get("changed"):
            changed, changed_named = unpack(answer["changed"])
            for old, new in (*zip(arguments, changed), *((named[key], changed_named[key]) for key in named)):
                assign(old, new)
        if "raised" in answer:
            raise imitate(answer)
        return unpack(answer["value"])

    proxy.__name__ = name
    return proxy


def assign(old: Any, new: Any) -> None:
    """Give a list, dict or set the contents of `new`."""
    if type(old) in (list, dict, set):
        old.clear()
        (old.extend if type(old) is list else old.update)(new)
