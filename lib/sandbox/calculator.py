"""A calculator for models: sums and string questions, by a walk over whitelisted syntax nodes."""

import ast
import contextlib
import math
import re
import threading
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

# Bounds of the work.
EXPRESSION = 1000  # characters of an expression
DEPTH = 50  # levels of nesting
BITS = 4096  # of a number, above and below the fraction line
STRING = 10_000  # characters of a string, or of all strings of a list

QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
# A number with commas between its thousands, and nothing that only looks like one.
GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
SUM = re.compile(r"[\d\s+\-*/%.()]*")
# "50% - 20" means half less twenty to people and a remainder to Python, so it is refused.
PERCENT = re.compile(r"%\s*[-+]")
# Python only warns of digits that run into letters; exponents such as 1e3 are let through.
RUN_TOGETHER = re.compile(r"\d[a-df-zA-DF-Z_]|[eE]\d*[a-zA-Z_]\d")

# Several engines calculate at once, each in a thread of its own.
PARSING = threading.Lock()


class Refused(Exception):
    """Not on the whitelist, or too big."""


# What an expression can fail with; anything else is a mistake of ours.
FAILURES = (
    Refused,
    SyntaxError,
    TypeError,
    ValueError,
    IndexError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)


def calculator(expression: str, *, wide: bool = False) -> str | None:
    """The value of an expression as text, or None where it is refused or has none.

    Never raises, and the work is bounded by EXPRESSION, DEPTH, BITS and STRING.

    Numbers (commas between thousands are dropped) with + - * / // % and parentheses, or one
    'text'.count('t'). Arithmetic is exact, on fractions. A whole result is written without a point
    (10/2 is 5, as in GSM8K), any other as the nearest float in plain decimals, so that each result
    can be put into the next expression. Powers, exponent notation, functions and other methods are
    refused, as in the reference (golden data `generation_T.json`), because a model trained with one
    calculator should meet the same one later. So is a percent sign before a sign, as in 50% - 20.

    wide: also **, 1e3, comparisons, `in`, strings everywhere, indexing and slicing, and FUNCTIONS
    and METHODS.
    """
    if not isinstance(expression, str) or len(expression) > EXPRESSION:
        return None
    try:
        return written(value(parsed(expression, wide), wide, DEPTH))
    except FAILURES:
        return None


# ---- reading


def parsed(expression: str, wide: bool) -> ast.expr:
    """The syntax tree of an expression, or Refused where its signs alone say that it is no sum."""
    # backslashes are refused so that the quoted parts are certain
    if "\\" in expression:
        raise Refused
    quoted = QUOTED.findall(expression)
    plain = [GROUPED.sub(_ungrouped, part) for part in QUOTED.split(expression)]
    if any(RUN_TOGETHER.search(part) or PERCENT.search(part) for part in plain):
        raise Refused
    if not wide and not quoted and not SUM.fullmatch(plain[0]):
        raise Refused
    code = "".join(a + b for a, b in zip(plain, [*quoted, ""], strict=True))
    tree = _syntax_tree(code.strip())
    if not wide and quoted and not _counts(tree):
        raise Refused
    return tree


def _syntax_tree(code: str) -> ast.expr:
    """`ast.parse` of an expression, safe in several threads.

    Python keeps one depth for all threads that are parsing, and raises SystemError where another
    one has moved it meanwhile (python/cpython#106905). So ours take turns; whoever else parses at
    that moment is gone the next time.
    """
    with PARSING:
        for _ in range(10):
            with contextlib.suppress(SystemError):
                return ast.parse(code, mode="eval").body
        return ast.parse(code, mode="eval").body


def _ungrouped(number: re.Match) -> str:
    return number[0].replace(",", "")


def _counts(tree: ast.expr) -> bool:
    """Whether a tree is 'text'.count('t'), of two constants."""
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Attribute):
        return False
    constants = [tree.func.value, *tree.args]
    return tree.func.attr == "count" and all(isinstance(c, ast.Constant) for c in constants)


def written(x) -> str:
    """A value as the model reads it."""
    if not isinstance(x, Fraction):
        return str(x)
    if x.denominator == 1:
        return str(x.numerator)
    # plain decimals: 0.00001 and not 1e-05, which the calculator itself would refuse
    return format(Decimal(repr(float(x))), "f")


# ---- bounded values: Fraction, str, bool, list of str


def bounded(x):
    """x itself, or Refused where it is of no kind we compute with or too big to go on with."""
    if isinstance(x, bool):
        return x
    if isinstance(x, float):
        return Fraction(repr(x))  # as written: 0.1 is a tenth; ValueError for infinity and nan
    if isinstance(x, int | Fraction):
        x = Fraction(x)
        fits = max(x.numerator.bit_length(), x.denominator.bit_length()) <= BITS
    elif isinstance(x, str):
        fits = len(x) <= STRING
    elif isinstance(x, list) and all(isinstance(s, str) for s in x):
        fits = sum(map(len, x)) + len(x) <= STRING
    else:
        fits = False
    if not fits:
        raise Refused
    return x


def whole(x) -> int:
    """An int from a number without fraction."""
    if isinstance(x, Fraction) and x.denominator == 1:
        return x.numerator
    raise Refused


# ---- what may be done with them


def numbers(function: Callable) -> Callable:
    """`function` of numbers only."""

    def guarded(*args):
        if not all(type(a) is Fraction for a in args):
            raise Refused
        return function(*args)

    return guarded


def text_or_list(function: Callable) -> Callable:
    """`function` of a string or a list only."""

    def guarded(x):
        if not isinstance(x, str | list):
            raise Refused
        return function(x)

    return guarded


def kinds(*allowed: type) -> Callable[[list], bool]:
    """A check that arguments are of these types, one for one."""

    def check(args):
        pairs = zip(args, allowed, strict=False)
        return len(args) == len(allowed) and all(isinstance(a, t) for a, t in pairs)

    return check


def plus(a, b):
    """Sum of numbers, or two strings joined."""
    if {type(a), type(b)} not in ({str}, {Fraction}):
        raise Refused
    return a + b


def times(a, b):
    """Product of numbers, or a string repeated."""
    if not isinstance(a, str) and not isinstance(b, str):
        return a * b
    text, n = (a, b) if isinstance(a, str) else (b, a)
    if len(text) * whole(n) > STRING:
        raise Refused
    return text * whole(n)


def power(a, b):
    """A power whose size is looked at before it is computed."""
    if b.denominator != 1:
        return float(a) ** float(b)  # of a negative number: complex, which bounded refuses
    if abs(b) * max(a.numerator.bit_length(), a.denominator.bit_length()) > 2 * BITS:
        raise Refused
    return a ** int(b)


def replaced(text: str, old: str, new: str) -> str:
    if len(text) + text.count(old) * len(new) > STRING:
        raise Refused
    return text.replace(old, new)


def joined(between: str, parts: list[str]) -> str:
    if sum(map(len, parts)) + len(between) * len(parts) > STRING:
        raise Refused
    return between.join(parts)


def rounded(x, digits=None):
    if digits is None:
        return round(x)
    if abs(digits) > 100:
        raise Refused
    return round(x, whole(digits))


def to_int(x):
    if isinstance(x, str) and not re.fullmatch(r"\s*[+-]?\d+\s*", x):
        raise Refused
    return int(x)


def to_float(x):
    return Fraction(repr(float(x))) if isinstance(x, str) else x


BINARY = {
    ast.Add: plus,
    ast.Sub: numbers(lambda a, b: a - b),
    ast.Mult: times,
    ast.Div: numbers(lambda a, b: a / b),
    ast.FloorDiv: numbers(lambda a, b: a // b),
    ast.Mod: numbers(lambda a, b: a % b),
    ast.Pow: numbers(power),
}
UNARY = {ast.USub: numbers(lambda a: -a), ast.UAdd: numbers(lambda a: a)}
COMPARE = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
FUNCTIONS = {
    "abs": numbers(abs),
    "round": numbers(rounded),
    "min": numbers(min),
    "max": numbers(max),
    "int": to_int,
    "float": to_float,
    "str": written,
    "len": text_or_list(len),
    "list": text_or_list(list),
    "sorted": text_or_list(sorted),
    "sqrt": numbers(lambda x: math.sqrt(x)),
}
CHANGE = ("upper", "lower", "title", "capitalize", "swapcase")
TEST = ("isalpha", "isdigit", "isupper", "islower", "isalnum", "isspace")
SEARCH = ("count", "find", "rfind", "index", "startswith", "endswith")
TRIM = ("strip", "lstrip", "rstrip", "split")
# Methods of strings: what the arguments must be, and the work where it isn't str's own.
METHODS: dict[str, tuple[list[Callable], Callable]] = {
    **{name: ([kinds()], getattr(str, name)) for name in CHANGE + TEST},
    **{name: ([kinds(str)], getattr(str, name)) for name in SEARCH},
    **{name: ([kinds(), kinds(str)], getattr(str, name)) for name in TRIM},
    "replace": ([kinds(str, str)], replaced),
    "join": ([kinds(str), kinds(list)], joined),
}


# ---- walking the tree


def value(node: ast.expr, wide: bool, depth: int):
    """The bounded value (Fraction, str, bool, list of str) of a tree of whitelisted nodes."""
    if depth == 0 or type(node) not in NODES:
        raise Refused
    return bounded(NODES[type(node)](node, lambda child: value(child, wide, depth - 1), wide))


def _constant(node, of, wide):
    if not isinstance(node.value, bool | int | float | str):
        raise Refused
    return node.value


def _unary(node, of, wide):
    if type(node.op) not in UNARY:
        raise Refused
    return UNARY[type(node.op)](of(node.operand))


def _binary(node, of, wide):
    if type(node.op) not in BINARY or (isinstance(node.op, ast.Pow) and not wide):
        raise Refused
    return BINARY[type(node.op)](of(node.left), of(node.right))


def _call(node, of, wide):
    """A method of a string, or one of FUNCTIONS."""
    if node.keywords:
        raise Refused
    if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
        checks, method = METHODS[node.func.attr]
        text, args = of(node.func.value), [of(a) for a in node.args]
        if not isinstance(text, str) or not any(check(args) for check in checks):
            raise Refused
        return method(text, *args)
    if wide and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
        return FUNCTIONS[node.func.id](*[of(a) for a in node.args])
    raise Refused


def _compare(node, of, wide):
    if not all(type(op) in COMPARE for op in node.ops):
        raise Refused
    sides = [of(node.left), *map(of, node.comparators)]
    steps = zip(node.ops, sides, sides[1:], strict=False)
    return all(COMPARE[type(op)](a, b) for op, a, b in steps)


def _subscript(node, of, wide):
    text, place = of(node.value), node.slice
    if not isinstance(place, ast.Slice):
        return text[whole(of(place))]
    ends = (place.lower, place.upper, place.step)
    return text[slice(*[None if end is None else whole(of(end)) for end in ends])]


def _list(node, of, wide):
    return [of(part) for part in node.elts]


# node type -> function(node, value of a child, wide)
NODES: dict[type, Callable] = {
    ast.Constant: _constant,
    ast.UnaryOp: _unary,
    ast.BinOp: _binary,
    ast.Call: _call,
    ast.Compare: _compare,
    ast.Subscript: _subscript,
    ast.List: _list,
}
