"""The rules that a model is to apply: operands in, answer out, computed exactly and never stored.

Operands and answers are texts, as a question shows them. A rule that does not apply to an operand raises ValueError.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from fractions import Fraction

_INTEGER = re.compile(r"-?\d+").fullmatch
PLACES = 2
"""Decimal places of answers that are not integers."""


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        name: tells it apart from all others.
        operator: how a question writes it: ``a operator b =`` or ``operator a =``; empty for word problems.
        arity: number of operands.
        apply: the answer for as many operands.
        answer: what answers are: ``number``, ``bits``, ``text``, ``list``, ``set``, ``truth`` or ``sign``.
    """

    name: str
    operator: str
    arity: int
    apply: Callable[..., str]
    answer: str = "number"


# -- reading and writing operands -------------------------------------------------------------------------------------

def integer(text: str) -> int:
    """The number that ``text`` is; ValueError where it is none."""
    if not _INTEGER(text):
        raise ValueError(f"expected an integer, got {text!r}")
    return int(text)


def rounded(value: Fraction) -> str:
    """To :data:`PLACES` places, half to even, without zeros at the end; exact."""
    scaled = round(value * 10**PLACES)
    before, after = divmod(abs(scaled), 10**PLACES)
    text = f"{before}.{after:0{PLACES}d}".rstrip("0").rstrip(".")
    return "-" + text if scaled < 0 else text


def bits(text: str) -> str:
    """``text``, if it is a bit string."""
    if not text or set(text) - {"0", "1"}:
        raise ValueError(f"expected bits, got {text!r}")
    return text


def place(text: str, length: int) -> int:
    """A place or distance in [0, length)."""
    n = integer(text)
    if not 0 <= n < length:
        raise ValueError(f"expected a position in [0, {length}), got {n}")
    return n


def numbers(text: str, brackets: str = "[]") -> list[int]:
    """The integers of a list, or of a set with ``brackets="{}"``."""
    if len(text) < 2 or text[0] != brackets[0] or text[-1] != brackets[1]:
        raise ValueError(f"expected a list in {brackets}, got {text!r}")
    return [integer(part) for part in text[1:-1].split(", ")] if len(text) > 2 else []


def written(values: Sequence[int], brackets: str = "[]") -> str:
    """A list of integers as text, or a set with ``brackets="{}"``."""
    return brackets[0] + ", ".join(map(str, values)) + brackets[1]


def in_base(value: int, base: int) -> str:
    """An integer written in ``base``, 2 to 10."""
    digits, rest = "", abs(value)
    while rest or not digits:
        digits = str(rest % base) + digits
        rest //= base
    return "-" + digits if value < 0 else digits


def from_base(text: str, base: int) -> int:
    """An integer read in ``base``."""
    return int(str(integer(text)), base)


# -- arithmetic -------------------------------------------------------------------------------------------------------

def _quotient(a: str, b: str) -> str:
    if integer(b) == 0:
        raise ValueError("expected a divisor other than 0, got 0")
    return rounded(Fraction(integer(a), integer(b)))


def _root(a: str) -> str:
    square = integer(a) * 10**(2 * PLACES)
    if square < 0:
        raise ValueError(f"expected a number >= 0, got {a}")
    below = math.isqrt(square)
    # (below + 1/2)^2 is below^2 + below + 1/4, so integers decide on which side of the middle the root lies
    return rounded(Fraction(below + (square > below * below + below), 10**PLACES))


ARITHMETIC = [
    Rule("add", "+", 2, lambda a, b: str(integer(a) + integer(b))),
    Rule("subtract", "-", 2, lambda a, b: str(integer(a) - integer(b))),
    Rule("multiply", "*", 2, lambda a, b: str(integer(a) * integer(b))),
    Rule("divide", "/", 2, _quotient),
]
SQUARE_ROOT = [Rule("square root", "square_root", 1, _root)]
BASES = (3, 4, 5)
NUMBER_WORDS = {3: "three", 4: "four", 5: "five"}


def _based(base: int, value: Callable[[int, int], int]) -> Callable[[str, str], str]:
    return lambda a, b: in_base(value(from_base(a, base), from_base(b, base)), base)


def _converted(base: int, a: str, b: str) -> str:
    if integer(b) != base:
        raise ValueError(f"expected {base}, got {b}")
    return in_base(integer(a), base)


BASED = {base: [
    Rule(f"add in base {base}", "+", 2, _based(base, lambda a, b: a + b)),
    Rule(f"subtract in base {base}", "-", 2, _based(base, lambda a, b: a - b)),
    Rule(f"multiply in base {base}", "*", 2, _based(base, lambda a, b: a * b)),
    Rule(f"convert to base {base}", "to_base", 2, functools.partial(_converted, base)),
] for base in BASES}


# -- bits -------------------------------------------------------------------------------------------------------------

def _bitwise(value: Callable[[int, int], int]) -> Callable[[str, str], str]:
    def apply(a: str, b: str) -> str:
        if len(bits(a)) != len(bits(b)):
            raise ValueError(f"expected equally many bits, got {a} and {b}")
        return format(value(int(a, 2), int(b, 2)), f"0{len(a)}b")

    return apply


def _shifted(shift: Callable[[str, int], str]) -> Callable[[str, str], str]:
    return lambda a, n: shift(bits(a), place(n, len(a)))


def _at(change: Callable[[str], str]) -> Callable[[str, str], str]:
    """Change the bit at a place counted from the right, from 0."""

    def apply(a: str, n: str) -> str:
        k = len(bits(a)) - 1 - place(n, len(a))
        return a[:k] + change(a[k]) + a[k + 1:]

    return apply


def _not(a: str) -> str:
    return bits(a).translate(str.maketrans("01", "10"))


BITWISE = [
    Rule("and", "and", 2, _bitwise(lambda a, b: a & b), "bits"),
    Rule("or", "or", 2, _bitwise(lambda a, b: a | b), "bits"),
    Rule("xor", "xor", 2, _bitwise(lambda a, b: a ^ b), "bits"),
    Rule("not", "not", 1, _not, "bits"),
]
SHIFTS = [
    Rule("logical shift left", "logical_left", 2, _shifted(lambda a, n: a[n:] + "0" * n), "bits"),
    Rule("logical shift right", "logical_right", 2, _shifted(lambda a, n: "0" * n + a[:len(a) - n]), "bits"),
    Rule("arithmetic shift left", "arithmetic_left", 2, _shifted(lambda a, n: a[n:] + "0" * n), "bits"),
    Rule("arithmetic shift right", "arithmetic_right", 2, _shifted(lambda a, n: a[0] * n + a[:len(a) - n]), "bits"),
    Rule("rotate left", "rotate_left", 2, _shifted(lambda a, n: a[n:] + a[:n]), "bits"),
    Rule("rotate right", "rotate_right", 2, _shifted(lambda a, n: a[len(a) - n:] + a[:len(a) - n]), "bits"),
]
SINGLE_BITS = [
    Rule("check bit", "check_bit", 2, lambda a, n: bits(a)[len(a) - 1 - place(n, len(a))], "truth"),
    Rule("set bit", "set_bit", 2, _at(lambda bit: "1"), "bits"),
    Rule("clear bit", "clear_bit", 2, _at(lambda bit: "0"), "bits"),
    Rule("toggle bit", "toggle_bit", 2, _at(_not), "bits"),
]


# -- strings ----------------------------------------------------------------------------------------------------------

def _count(a: str, b: str) -> str:
    if len(b) != 1:
        raise ValueError(f"expected a single character, got {b!r}")
    return str(a.count(b))


def _contains(a: str, b: str) -> str:
    rest = iter(a)
    return "T" if all(character in rest for character in b) else "F"


COUNTS = [Rule("count", "count", 2, _count)]
STRINGS = [
    Rule("reverse", "reverse", 1, lambda a: a[::-1], "text"),
    Rule("concatenate", "concatenate", 2, lambda a, b: a + b, "text"),
    Rule("repeat", "repeat", 1, lambda a: a + a, "text"),
    Rule("length", "get_length", 1, lambda a: str(len(a))),
]
SUBSEQUENCES = [Rule("contains in order", "contains_in_order", 2, _contains, "truth")]


# -- lists, sets, dates -----------------------------------------------------------------------------------------------

def _some(values: list[int]) -> list[int]:
    if not values:
        raise ValueError("expected one value or more, got none")
    return values


def _sets(value: Callable[[set[int], set[int]], set[int]]) -> Callable[[str, str], str]:
    return lambda a, b: written(sorted(value(set(numbers(a, "{}")), set(numbers(b, "{}")))), "{}")


def _days(a: str, b: str) -> str:
    one, two = numbers(a), numbers(b)
    if len(one) != 3 or len(two) != 3:
        raise ValueError(f"expected dates [year, month, day], got {a} and {b}")
    return str(abs((date(*one) - date(*two)).days))


LISTS = [
    Rule("sort", "sort", 1, lambda a: written(sorted(numbers(a))), "list"),
    Rule("filter", "filter", 2, lambda a, n: written([x for x in numbers(a) if x > integer(n)]), "list"),
    Rule("deduplicate", "deduplicate", 1, lambda a: written(list(dict.fromkeys(numbers(a)))), "list"),
]
LIST_COUNTS = [
    Rule("minimum", "min", 1, lambda a: str(min(_some(numbers(a))))),
    Rule("maximum", "max", 1, lambda a: str(max(_some(numbers(a))))),
    Rule("median", "median", 1, lambda a: str(sorted(_some(numbers(a)))[len(numbers(a)) // 2])),
    Rule("majority", "majority", 1, lambda a: str(Counter(_some(numbers(a))).most_common(1)[0][0])),
]
SETS = [
    Rule("intersection", "intersection", 2, _sets(lambda a, b: a & b), "set"),
    Rule("union", "union", 2, _sets(lambda a, b: a | b), "set"),
    Rule("difference", "difference", 2, _sets(lambda a, b: a - b), "set"),
]
DATES = [Rule("days between", "days_between", 2, _days)]


# -- functions of one number, to be inferred from pairs ---------------------------------------------------------------

_remembering = functools.lru_cache(maxsize=128)  # induction asks each function for the same few arguments


def _integer_function(value: Callable[[int], int]) -> Callable[[str], str]:
    return _remembering(lambda x: str(value(integer(x))))


def _wave(value: Callable[[Fraction], Fraction], k: int) -> Callable[[str], str]:
    """A wave of k periods in ten steps; exact, since the phase is a fraction."""
    return _remembering(lambda x: rounded(value(Fraction(k * integer(x) % 10, 10))))


def _trigonometric(value: Callable[[float], float], a: int, b: int) -> Callable[[str], str]:
    def apply(x: str) -> str:
        exact = a * value(b * integer(x))
        # Mathematical libraries differ in the last bit: a value so near to a tie could be rounded either way.
        if abs(abs(exact * 10**PLACES) % 1 - 0.5) < 1e-6:
            raise ValueError(f"expected a value that rounds alike everywhere, got {exact}")
        return rounded(Fraction(f"{exact:.{PLACES}f}"))

    return _remembering(apply)


def _square(phase: Fraction) -> Fraction:
    return Fraction(1 if phase <= Fraction(1, 2) else -1)


def _triangle(phase: Fraction) -> Fraction:
    return 4 * phase - 1 if phase < Fraction(1, 2) else 3 - 4 * phase


_PARAMETERS = range(1, 10)
FUNCTIONS: dict[str, list[Rule]] = {
    "linear": [Rule(f"{a}x + {b}", "fun", 1, _integer_function(lambda x, a=a, b=b: a * x + b))  # type: ignore[misc]
               for a in _PARAMETERS for b in _PARAMETERS],
    "quadratic": [Rule(f"{a}x^2 + {b}x + {c}", "fun", 1, _integer_function(
                      lambda x, a=a, b=b, c=c: a * x * x + b * x + c))  # type: ignore[misc]
                  for a in _PARAMETERS for b in _PARAMETERS for c in _PARAMETERS],
    "sine": [Rule(f"{a} sin({b}x)", "fun", 1, _trigonometric(math.sin, a, b))
             for a in _PARAMETERS for b in _PARAMETERS],
    "cosine": [Rule(f"{a} cos({b}x)", "fun", 1, _trigonometric(math.cos, a, b))
               for a in _PARAMETERS for b in _PARAMETERS],
    "square-wave": [Rule(f"square wave, {k} periods in ten", "fun", 1, _wave(_square, k), "sign") for k in _PARAMETERS],
    "triangle-wave": [Rule(f"triangle wave, {k} periods in ten", "fun", 1, _wave(_triangle, k)) for k in _PARAMETERS],
    "sawtooth-wave": [Rule(f"sawtooth wave, {k} periods in ten", "fun", 1, _wave(lambda p: 2 * p - 1, k))
                      for k in _PARAMETERS],
}
"""Name of the sub-dataset -> its rules, one for each choice of integer parameters from 1 to 9."""

LIBRARY: list[Rule] = [
    *ARITHMETIC, *SQUARE_ROOT, *(rule for rules in BASED.values() for rule in rules), *BITWISE, *SHIFTS, *SINGLE_BITS,
    *COUNTS, *STRINGS, *SUBSEQUENCES, *LISTS, *LIST_COUNTS, *SETS, *DATES,
    *(rule for rules in FUNCTIONS.values() for rule in rules)]
"""All rules of expressions."""


def explaining(rules: Sequence[Rule], pairs: Sequence[tuple[Sequence[str], str]]) -> list[Rule]:
    """Program induction by search: the ``rules`` that give the right answer in all ``pairs`` (operands, answer)."""
    arities = {len(operands) for operands, _ in pairs}
    left = [rule for rule in rules if arities <= {rule.arity}]
    for operands, answer in pairs:
        left = [rule for rule in left if _gives(rule, operands, answer)]
    return left


def _gives(rule: Rule, operands: Sequence[str], answer: str) -> bool:
    try:
        return rule.apply(*operands) == answer
    except ValueError:
        return False
