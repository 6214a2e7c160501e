"""A pickle's content as plain data. Nothing is imported, looked up or called: unpickling can run any program.

A pickle is a program for a stack machine. This one knows the instructions that build values, and of those that name a
class or a function only names on a list; what they would make becomes a record of its name and arguments, for the
reader to interpret.
"""

import pickletools
import struct
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from nanochat.common import UserError, first_line

MAX_BYTES = 64 * 2**20  # a vocabulary of a million tokens is smaller
MAX_INSTRUCTIONS = 2_000_000  # of a vocabulary of 280,000 tokens, in the wordiest protocol
MAX_MARKS = 100  # containers that are open at once
MAX_PROTOCOL = 5


@dataclass(frozen=True)
class Global:
    """A class or function that the pickle names, such as torch.FloatStorage."""

    name: str


@dataclass(eq=False)
class Call:
    """A function of this name called with these arguments, and the state that its result was given."""

    name: str
    args: tuple[Any, ...]
    state: Any = None


@dataclass(eq=False)
class Reference:
    """Something outside of the pickle, by its persistent id."""

    id: Any


class NotPlain(ValueError):
    """The pickle holds something else than plain data and the calls that are known."""


def read_pickle(data: bytes, where: object, known: Collection[str]) -> Any:
    """The value of a pickle: dicts, lists, tuples, str, bytes, int, float, bool, None, Global, Call and Reference.

    Calls and globals not in `known` raise UserError, as anything else does that is no plain data, or is too large.
    Containers may contain themselves: do not walk them without a limit.
    """
    if len(data) > MAX_BYTES:
        raise UserError(f"{where} has {len(data):,} bytes: it cannot be what it is named")
    try:
        with warnings.catch_warnings(action="ignore"):  # about escapes in strings of a kind that is refused below
            return _Machine(known).run(data)
    except NotPlain as error:
        raise UserError(f"{where} is refused: {error}") from error
    except (ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise UserError(f"{where} is damaged, or no pickle: {first_line(error)}") from error


class _Machine:
    """The stack, the stacks below the open marks, and the memo."""

    def __init__(self, known: Collection[str]) -> None:
        self.known = known
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """Follow the instructions to STOP. Raises NotPlain, and ValueError and the like for damaged ones."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count >= MAX_INSTRUCTIONS:
                raise NotPlain(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
            if opcode.name == "STOP":
                break
            handler = HANDLERS.get(opcode.name)
            if handler is None:
                raise NotPlain(f"it has the instruction {opcode.name}, which no plain data needs")
            handler(self, argument)
        if len(self.stack) != 1 or self.below:
            raise ValueError("its instructions leave no single value")
        return self.stack.pop()

    # -- values ---------------------------------------------------------------------------------------

    def skip(self, argument: Any) -> None:
        """Framing says nothing about the content."""

    def proto(self, version: int) -> None:
        if version > MAX_PROTOCOL:
            raise NotPlain(f"its protocol is {version}, the latest known {MAX_PROTOCOL}")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_int(self, value: int) -> None:
        if not -(2**63) <= value < 2**63:
            raise NotPlain("it has a number of more than 64 bits")
        self.stack.append(value)

    # -- containers -----------------------------------------------------------------------------------

    def mark(self, argument: Any) -> None:
        if len(self.below) >= MAX_MARKS:
            raise NotPlain(f"it is nested more than {MAX_MARKS} deep")
        self.below.append(self.stack)
        self.stack = []

    def to_mark(self) -> list[Any]:
        """The values since the last mark, which is closed."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def tuple_(self, argument: Any) -> None:
        self.push(tuple(self.to_mark()))

    def tuple_of(self, size: int) -> None:
        items = [self.stack.pop() for _ in range(size)]
        self.push(tuple(reversed(items)))

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise NotPlain("it appends to something else than a list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise NotPlain("it sets items of something else than a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | bytes | int):
                raise NotPlain("a key is neither text nor a number")
            target[key] = value

    # -- the memo -------------------------------------------------------------------------------------

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self, argument: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    # -- what is named, and never made ------------------------------------------------------------------

    def global_(self, name: str) -> None:
        name = ".".join(name.split(" ", 1))
        if name not in self.known:
            raise NotPlain(f"it names {name[:100]!r}, which is not among what such a file needs; it may be an attack")
        self.push(Global(name))

    def stack_global(self, argument: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise NotPlain("a name is no text")
        self.global_(f"{module} {name}")

    def call(self, argument: Any) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise NotPlain("it calls something that has no name")
        match function.name, args:
            case "collections.OrderedDict", ():
                self.push({})
            case "_codecs.encode", (str(text), "latin1"):  # bytes, before there was an instruction for them
                self.push(text.encode("latin1"))
            case _:
                self.push(Call(function.name, args))

    def build(self, argument: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Call):
            target.state = state
        elif not (isinstance(target, dict) and isinstance(state, dict) and set(state) == {"_metadata"}):
            raise NotPlain("it sets attributes of plain data")  # but for the versions of a state dict's modules

    def reference(self, argument: Any) -> None:
        self.push(Reference(self.stack.pop()))


HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.proto,
    "FRAME": _Machine.skip,
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4"), _Machine.push_int),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _Machine.push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINFLOAT"), _Machine.push),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple_,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.to_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop() for _ in range(2)][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.to_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    "MEMOIZE": _Machine.memoize,
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.call),
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.reference,
}
"""By the instruction's name in pickletools."""
