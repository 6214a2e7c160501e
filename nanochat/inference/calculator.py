"""The calculator a model may call while it answers: arithmetic and string counting.

The source is screened character by character, parsed with `ast.parse`, and the tree is walked with an
allow-list. Nothing is ever passed to eval or exec, no attribute is looked up on a live object, and every
number is bounded before it is computed, so no input costs more than microseconds or kilobytes. It uses
no signal and no shared state: it works in any thread.
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

# Strings may hold any printable character of any script but no escape: `\` is refused before parsing, since
# the parser prints warnings about unknown escapes.
STRING = re.compile(r'"[^"]*"|\'[^\']*\'')
THOUSANDS = re.compile(r"(?<![\d.,])[0-9]{1,3}(?:,[0-9]{3})+(?![\d,])")
ARITHMETIC = re.compile(r"[0-9eE.+\-*/%() _\t]*")

OPERATORS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class Refused(Exception):
    """The expression is outside what the calculator does."""


def use_calculator(expr: str) -> Number | None:
    """The value of `expr`, or None if it is anything but a small sum or a count of letters.

    Understood: integers and decimals, also with thousands commas (`1,234+5`), `+ - * / // % **`,
    parentheses, and `"strawberry".count("r")`, which may be part of a sum. Integers are exact. A
    fraction is rounded to 12 significant digits (0.1+0.2 is 0.3), and one that is whole is an int
    (`84/7` is 12, as a person would write it). Never raises; `str()` of the result is what the
    engine shows to the model.
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

    This keeps names, keywords, prefixes such as f"" and everything the parser warns about from
    ever reaching the parser.
    """
    if not source.isprintable() or "\\" in source:
        raise Refused
    strings = STRING.findall(source)
    pieces = [THOUSANDS.sub(lambda match: match[0].replace(",", ""), piece) for piece in STRING.split(source)]
    if not ARITHMETIC.fullmatch(" ".join(pieces).replace(".count(", "(")):
        raise Refused
    return "".join(piece + string for piece, string in zip(pieces, [*strings, ""]))


def value_of(node: ast.expr, depth: int) -> Number:
    """The number that `node` stands for; raises Refused for any node outside the allow-list."""
    if depth > MAX_DEPTH:
        raise Refused
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return bounded(node.value)  # type: ignore[arg-type]  # complex, str and bool are excluded just above
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = value_of(node.operand, depth + 1)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = value_of(node.left, depth + 1), value_of(node.right, depth + 1)
        if isinstance(node.op, ast.Pow):
            return power(left, right)
        if type(node.op) in OPERATORS:
            value = bounded(OPERATORS[type(node.op)](left, right))
            if left and right and not value and isinstance(node.op, ast.Mult | ast.Div):
                raise Refused  # too small for a float, which is not 0
            return value
    if isinstance(node, ast.Call):
        return count_of(node)
    raise Refused


def count_of(node: ast.Call) -> int:
    """`"text".count("part")` on two literal strings, nothing else."""
    function = node.func
    if not isinstance(function, ast.Attribute) or function.attr != "count" or node.keywords or len(node.args) != 1:
        raise Refused
    text, part = function.value, node.args[0]
    if not isinstance(text, ast.Constant) or not isinstance(part, ast.Constant):
        raise Refused
    if not isinstance(text.value, str) or not isinstance(part.value, str):
        raise Refused
    return text.value.count(part.value)


def power(base: Number, exponent: Number) -> Number:
    """base ** exponent, refused before it is computed where the result would be too long."""
    if abs(exponent) > MAX_EXPONENT:
        raise Refused
    # |base| >= 2^(bits-1), so an integer result has at least (bits-1) * exponent bits.
    if isinstance(base, int) and isinstance(exponent, int) and (base.bit_length() - 1) * exponent > MAX_BITS:
        raise Refused
    value = bounded(base**exponent)
    if base and not value:
        raise Refused  # too small for a float, which is not 0
    return value


def bounded(value: Number) -> Number:
    """`value` if it is a finite number of at most MAX_DIGITS digits, else Refused."""
    if isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise Refused
    elif not isinstance(value, float) or not math.isfinite(value):  # a negative base to a fraction is complex
        raise Refused
    return value


def tidy(value: Number) -> Number:
    """A float without the noise of binary fractions: 12 significant digits, whole values as int."""
    if isinstance(value, int):
        return value
    value = float(f"{value:.12g}")
    return int(value) if value.is_integer() and abs(value) < 1e15 else value
