"""Fast paths that notice when the code they stand for has changed.

A fast path (a C kernel, the C decoder, a GPU's attention kernel, fp8) computes in another way what plain PyTorch
functions define. It lists those functions by name with their fingerprints at the time it was written. When one of them
is edited, replaced at run time or overridden, the plain functions run instead and one warning names the change.

To change a plain function: edit it. Everything keeps working, slower. To make the fast path follow, change it too and
record the new fingerprint, which tests/test_fast_path.py prints.
"""

import ast
import contextlib
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any

from nanochat.common import warn

_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Print a warning the first time this process has this message."""
    if message not in _warned:
        _warned.add(message)
        warn(message)


def changed(recorded: Mapping[str, str], module: Any) -> list[str]:
    """Names of functions whose present form in `module` is not the recorded one.

    `recorded` maps a dotted name inside the module, such as "Block.forward", to its fingerprint. One that is gone has
    changed.
    """

    def present(name: str) -> Any:
        with contextlib.suppress(AttributeError):
            return attrgetter(name)(module)

    return [name for name, known in recorded.items() if fingerprint(present(name)) != known]


@functools.cache
def fingerprint(function: Any) -> str:
    """Eight hex digits that change with what a Python function computes, not with comments, annotations or layout.

    Of a function with a C form (cpu.fused.in_c) its plain form counts. "" for what has no Python source, such as a
    functools.partial. The same on all Python versions: it is made from the syntax tree, not from the bytecode.
    """
    import hashlib

    code = getattr(getattr(function, "plain", function), "__code__", None)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code))).body[0]  # type: ignore[arg-type]
    except (TypeError, OSError, SyntaxError, IndexError):
        return ""
    return hashlib.sha256(" ".join(_tokens(tree)).encode()).hexdigest()[:8]


IGNORED = ("annotation", "returns", "decorator_list", "type_comment", "type_params", "ctx", "kind")


def _tokens(node: Any) -> Iterator[str]:
    """The syntax tree depth first, without docstrings, IGNORED fields, and empty ones, which differ between Pythons."""
    if isinstance(node, list):
        for child in node:
            yield from _tokens(child)
    elif isinstance(node, ast.AST):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return
        yield type(node).__name__
        for name, value in ast.iter_fields(node):
            if name not in IGNORED and value not in (None, []):
                yield name
                yield from _tokens(value)
        yield "."
    else:
        yield repr(node)


def modified_modules(model: Any, known: Iterable[type]) -> list[str]:
    """What makes modules of a torch model differ from the classes `known`: another type, an attribute of the instance
    that hides a method, or a forward hook. Empty if nothing does."""
    known, found = frozenset(known), []
    for name, module in model.named_modules():
        kind = type(module)
        if kind not in known:
            found.append(f"{name or 'the model'} ({kind.__qualname__})")
        hidden = [key for key in vars(module) if callable(getattr(kind, key, None)) and key != "__doc__"]
        found += [f"{name}.{key}".lstrip(".") for key in hidden]
        if module._forward_hooks or module._forward_pre_hooks:
            found.append(f"a hook on {name or 'the model'}")
    return found


def unknown_fields(config: Any, known: Iterable[str]) -> list[str]:
    """Fields of a dataclass instance outside `known` that do not have their default."""
    import dataclasses

    known = frozenset(known)
    return [f.name for f in dataclasses.fields(config) if f.name not in known and getattr(config, f.name) != f.default]


def unknown_parts(
    model: Any,
    functions: Iterable[tuple[Any, Mapping[str, str]]],
    modules: Iterable[type],
    fields: Iterable[str],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[str]:
    """The parts of a network that are not as a second implementation of it knows them; [] if all are.

    It knows the functions of some modules by their fingerprints, and classes of modules, fields of the config, and
    parameters with their shapes.
    """
    found = [name.removesuffix(".fget") for module, recorded in functions for name in changed(recorded, module)]
    found += [f"{name}={getattr(model.config, name)}" for name in unknown_fields(model.config, fields)]
    found += modified_modules(model, modules)
    present = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return found + [name for name in sorted(shapes.keys() | present.keys()) if shapes.get(name) != present.get(name)]


def in_words(parts: list[str]) -> str:
    """The first five parts, for a message."""
    return ", ".join(parts[:5]) + (", ..." if len(parts) > 5 else "")
