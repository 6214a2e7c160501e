"""The calculator that a model may call while it answers: arithmetic and string counting.

The source is screened character by character, parsed with `ast.parse`, and the tree is evaluated by an allow-list.
Nothing is passed to eval or exec, no attribute is looked up on a live object, and every number is bounded before it is
computed, so no input costs more than milliseconds or kilobytes. No signals and no shared state: it works in any thread.
"""

import ast
import operator
import re
from collections.abc import Callable
from decimal import Context, Decimal, DivisionByZero, InvalidOperation, Overflow, Underflow, localcontext
from fractions import Fraction

Number = int | float

MAX_SOURCE_CHARS = 512
MAX_NODES = 256
MAX_DEPTH = 64
MAX_DIGITS = 200  # before the point, and zeros after it
MAX_BITS = 4096  # of a fraction's numerator or denominator
MAX_EXPONENT = 1000
FLOAT_DIGITS = 15  # significant decimal digits that a float always holds
ROUNDED_DIGITS = 12  # significant digits of a result that is not a short decimal, such as 1/3

# For roots, and for powers too long to be exact: of numbers so short, so many digits tell a whole root from another.
MAX_ROOT_BITS = 100
ROOTS = Context(
    prec=100, Emax=MAX_DIGITS, Emin=-MAX_DIGITS, traps=[DivisionByZero, InvalidOperation, Overflow, Underflow]
)

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
    `"strawberry".count("r")`, which may be part of an expression. The arithmetic is exact: decimals are decimal
    fractions (`0.3//0.1` is 3), and only roots are rounded. A whole result is an int (`84/7` is 12), another one a
    float: the exact decimal if it has up to 15 digits, else rounded (`1/3` is 0.333333333333). None if it would be
    rounded before the second decimal. The model sees `str()` of the result.
    """
    if not isinstance(expr, str) or not 0 < len(expr) <= MAX_SOURCE_CHARS:
        return None
    try:
        source = screen(expr.strip())
        tree = ast.parse(source, mode="eval")
        if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
            return None
        return rounded(value_of(tree.body, source))
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


def value_of(node: ast.expr, source: str, depth: int = 0) -> Fraction:
    """The value of `node`, a part of `source`; raises Refused for a node outside the allow-list."""
    if depth > MAX_DEPTH:
        raise Refused
    match node:
        case ast.Constant(value=value) if type(value) in (int, float):
            return literal(ast.get_source_segment(source, node) or "")
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return value_of(operand, source, depth + 1)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -value_of(operand, source, depth + 1)
        case ast.BinOp(op=op) if type(op) in OPERATORS:
            left, right = value_of(node.left, source, depth + 1), value_of(node.right, source, depth + 1)
            return bounded(Fraction(OPERATORS[type(op)](left, right)))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(text)), attr="count"),
            args=[ast.Constant(value=str(part))],
            keywords=[],
        ):
            return Fraction(text.count(part))
    raise Refused


def literal(text: str) -> Fraction:
    """The exact value of a number as it is written."""
    value = Decimal(text)
    if abs(value.adjusted()) >= MAX_DIGITS:  # before 1e-999999 becomes a fraction
        raise Refused
    return Fraction(value)


def power(base: Fraction, exponent: Fraction) -> Fraction:
    """base ** exponent, exact or to 100 digits; raises Refused before computing a result that would be too long."""
    if abs(exponent) > MAX_EXPONENT:
        raise Refused
    if exponent.denominator == 1 and num_bits(base) * abs(exponent) <= MAX_BITS:
        return base**exponent.numerator
    if num_bits(base) > MAX_ROOT_BITS:
        raise Refused
    with localcontext(ROOTS):
        return Fraction(to_decimal(base) ** to_decimal(exponent))


OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: power,
}


def bounded(value: Fraction) -> Fraction:
    """`value`; raises Refused if it is too long, too large, or too close to 0."""
    limit = 10**MAX_DIGITS
    if num_bits(value) > MAX_BITS or abs(value) >= limit or (value and abs(value) * limit < 1):
        raise Refused
    return value


def num_bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def to_decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / value.denominator


def rounded(value: Fraction) -> Number:
    """An int if `value` is whole, else a float of its decimal digits."""
    if value.denominator == 1:
        return value.numerator
    with localcontext(ROOTS):
        decimal = to_decimal(value)
    text = f"{decimal:.{FLOAT_DIGITS}g}"
    if Fraction(text) != value:
        digits = max(ROUNDED_DIGITS, decimal.adjusted() + 3)  # two decimals at least
        if digits > FLOAT_DIGITS:
            raise Refused
        text = f"{decimal:.{digits}g}"
    return float(text)
