"""The calculator that a model may call while it answers: arithmetic and string counting.

The source is screened character by character, parsed with `ast.parse`, and the tree is evaluated by an allow-list.
Nothing is passed to eval or exec, no attribute is looked up on a live object, and every number is bounded before it is
computed, so no input costs more than microseconds or kilobytes. No signals and no shared state: it works in any thread.
"""

import ast
import math
import operator
import re
from collections.abc import Callable

Number = int | float

MAX_SOURCE_CHARS = 512
MAX_NODES = 256
MAX_DEPTH = 64
MAX_DIGITS = 200
MAX_BITS = int(MAX_DIGITS * math.log2(10))
MAX_EXPONENT = 1000

# Strings may contain any printable character but no escape: `\` is refused before parsing, as the parser prints
# warnings about unknown escapes.
STRING = re.compile(r'"[^"]*"|\'[^\']*\'')
THOUSANDS = re.compile(r"(?<![\d.,])[0-9]{1,3}(?:,[0-9]{3})+(?![\d,])")
ARITHMETIC = re.compile(r"[0-9eE.+\-*/%() _\t]*")


class Refused(Exception):
    """The expression is outside the calculator's language."""


def use_calculator(expr: str) -> Number | None:
    """The value of an arithmetic expression or a count of letters, None for anything else. Never raises.

    Accepts integers and decimals, also with thousands commas (`1,234+5`), `+ - * / // % **`, parentheses, and
    `"strawberry".count("r")`, which may be part of an expression. Integers are exact. A float is rounded to 12
    significant digits (0.1+0.2 is 0.3), and a whole one becomes an int (`84/7` is 12). The model sees `str()` of the
    result.
    """
    if not isinstance(expr, str) or not 0 < len(expr) <= MAX_SOURCE_CHARS:
        return None
    try:
        tree = ast.parse(screen(expr.strip()), mode="eval")
        if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
            return None
        return tidy(value_of(tree.body, 0))
    except (Refused, ArithmeticError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def screen(source: str) -> str:
    """`source` without thousands commas; raises Refused on a character that no calculation needs.

    So names, keywords, prefixes such as f"" and anything the parser warns about never reach the parser.
    """
    if not source.isprintable() or "\\" in source:
        raise Refused
    strings = STRING.findall(source)
    pieces = [THOUSANDS.sub(lambda match: match[0].replace(",", ""), piece) for piece in STRING.split(source)]
    if not ARITHMETIC.fullmatch(" ".join(pieces).replace(".count(", "(")):
        raise Refused
    return "".join(piece + string for piece, string in zip(pieces, [*strings, ""]))


def value_of(node: ast.expr, depth: int) -> Number:
    """The value of `node`; raises Refused for a node outside the allow-list."""
    if depth > MAX_DEPTH:
        raise Refused
    match node:
        case ast.Constant(value=value) if type(value) in (int, float):
            return bounded(value)  # type: ignore[arg-type]
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return value_of(operand, depth + 1)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -value_of(operand, depth + 1)
        case ast.BinOp(op=op) if type(op) in OPERATORS:
            left, right = value_of(node.left, depth + 1), value_of(node.right, depth + 1)
            value = bounded(OPERATORS[type(op)](left, right))
            if left and right and not value and isinstance(op, ast.Mult | ast.Div | ast.Pow):
                raise Refused  # underflow: the true value is not 0
            return value
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(text)), attr="count"),
            args=[ast.Constant(value=str(part))],
            keywords=[],
        ):
            return text.count(part)
    raise Refused


def power(base: Number, exponent: Number) -> Number:
    """base ** exponent; raises Refused before computing a result that would be too long."""
    if abs(exponent) > MAX_EXPONENT:
        raise Refused
    # |base| >= 2^(bits-1), so an integer result has at least (bits-1) * exponent bits.
    if isinstance(base, int) and isinstance(exponent, int) and (base.bit_length() - 1) * exponent > MAX_BITS:
        raise Refused
    return base**exponent


OPERATORS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: power,
}


def bounded(value: Number) -> Number:
    """`value`; raises Refused unless it is a finite number of at most MAX_DIGITS digits."""
    if isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise Refused
    elif not isinstance(value, float) or not math.isfinite(value):  # (-8) ** 0.5 is complex
        raise Refused
    return value


def tidy(value: Number) -> Number:
    """A float rounded to 12 significant digits, which hides binary rounding; an int if it is whole."""
    if isinstance(value, int):
        return value
    value = float(f"{value:.12g}")
    return int(value) if value.is_integer() and abs(value) < 1e15 else value
