"""The paper's 82 sub-datasets: which rules each has, and which operands they get.

39 with original symbols and 42 with remapped ones have 96 items each; the word problems are 1,319 (as many as the
benchmark that the paper takes there), 9,095 in all.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from looseleaf_abstract_reasoning.draw import Draw
from looseleaf_abstract_reasoning.items import REMAPPINGS
from looseleaf_abstract_reasoning.rules import (
    ARITHMETIC,
    BASED,
    BASES,
    BITWISE,
    COUNTS,
    DATES,
    FUNCTIONS,
    LIST_COUNTS,
    LISTS,
    NUMBER_WORDS,
    SETS,
    SHIFTS,
    SINGLE_BITS,
    SQUARE_ROOT,
    STRINGS,
    SUBSEQUENCES,
    Rule,
    in_base,
    written,
)

CATEGORIES = {
    "basic-computation": "decimal arithmetic",
    "extended-calculation": "bits, strings, lists, sets, dates",
    "number-base": "arithmetic in base 3, 4 and 5",
    "math-application": "word problems",
    "symbolic-abstraction": "a function, from its values",
    "symbolic-reasoning": "extended calculation in remapped symbols",
}
"""The paper's six categories."""

DRAWN = tuple(name for name in CATEGORIES if name != "symbolic-reasoning")
"""Categories with problems of their own: symbolic reasoning is extended calculation, remapped."""

ITEMS, STORY_ITEMS = 96, 1319
BITS, SHORTEST_BITS = 8, 2
LENGTH, SHORTEST, LETTERS = 10, 4, 8
"""Characters of strings (the authors' data has 40), and different letters in all strings of a problem."""


@dataclass(frozen=True)
class Setting:
    """What holds for a whole problem.

    Attributes:
        digits: most digits of numbers.
        letters: of strings.
    """

    digits: int
    letters: Sequence[str] = string.ascii_lowercase


Operands = Callable[[Draw, Rule, Setting], tuple[str, ...]]


@dataclass(frozen=True)
class Dataset:
    """One sub-dataset with original symbols.

    Attributes:
        name: of the sub-dataset.
        category: one of :data:`CATEGORIES`.
        rules: one is drawn for each problem.
        operands: draws operands for a rule.
        remappings: the kinds that a problem may be remapped by.
        hint: a sentence before the demonstrations.
        size: items in the full suite.
    """

    name: str
    category: str
    rules: Sequence[Rule]
    operands: Operands
    remappings: tuple[str, ...] = REMAPPINGS
    hint: str = ""
    size: int = ITEMS


# -- operands ---------------------------------------------------------------------------------------------------------

def _decimal(draw: Draw, digits: int) -> int:
    """A number of 1 to ``digits`` digits, each length as likely as the others."""
    length = draw.whole(1, digits)
    return draw.whole(10 ** (length - 1), 10**length - 1)


def _decimals(draw: Draw, rule: Rule, setting: Setting) -> tuple[str, ...]:
    return tuple(str(_decimal(draw, setting.digits)) for _ in range(rule.arity))


def _in_base(base: int) -> Operands:
    def operands(draw: Draw, rule: Rule, setting: Setting) -> tuple[str, ...]:
        if rule.operator == "to_base":
            return str(_decimal(draw, setting.digits)), str(base)
        lengths = [draw.whole(1, setting.digits) for _ in range(2)]
        return tuple(in_base(draw.whole(base ** (n - 1), base**n - 1), base) for n in lengths)

    return operands


def _bits(fixed: bool) -> Operands:
    def operands(draw: Draw, rule: Rule, setting: Setting) -> tuple[str, ...]:
        length = BITS if fixed else draw.whole(SHORTEST_BITS, BITS)
        strings = [draw.word("01", length) for _ in range(rule.arity)]
        if rule in SHIFTS or rule in SINGLE_BITS:
            strings[1] = str(draw.whole(0, length - 1))
        return tuple(strings)

    return operands


def _strings(fixed: bool) -> Operands:
    def operands(draw: Draw, rule: Rule, setting: Setting) -> tuple[str, ...]:
        def text() -> str:
            return draw.word(setting.letters, LENGTH if fixed else draw.whole(SHORTEST, LENGTH))

        if rule in COUNTS:
            counted = text()
            return counted, draw.pick(counted)
        return tuple(text() for _ in range(rule.arity))

    return operands


def _subsequence(draw: Draw, rule: Rule, setting: Setting) -> tuple[str, ...]:
    text, length, wanted = draw.word(setting.letters, LENGTH), draw.whole(2, 3), draw.pick("TF")
    while True:  # half of the questions are to be answered by yes
        places = sorted(draw.some(range(LENGTH), length))
        sought = "".join(text[k] for k in places) if wanted == "T" else draw.word(setting.letters, length)
        if rule.apply(text, sought) == wanted:
            return text, sought


def _lists(draw: Draw, rule: Rule, setting: Setting) -> tuple[str, ...]:
    values = written([draw.whole(0, 9) for _ in range(draw.whole(3, 7))])
    return (values, str(draw.whole(0, 8))) if rule.arity == 2 else (values,)


def _sets(draw: Draw, rule: Rule, setting: Setting) -> tuple[str, ...]:
    return tuple(written(sorted(draw.some(range(7), draw.whole(1, 6))), "{}") for _ in range(2))


def _dates(draw: Draw, rule: Rule, setting: Setting) -> tuple[str, ...]:
    lengths = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
    dates = []
    for _ in range(2):
        year, month = draw.whole(2010, 2025), draw.whole(1, 12)
        leap = month == 2 and year % 4 == 0  # no century among these years
        dates.append(written([year, month, draw.whole(1, lengths[month - 1] + leap)]))
    return tuple(dates)


def _arguments(draw: Draw, rule: Rule, setting: Setting) -> tuple[str, ...]:
    return (str(draw.whole(1, 99)),)


def _stories(draw: Draw, rule: Rule, setting: Setting) -> tuple[str, ...]:
    raise NotImplementedError("stories draw their own numbers")


# -- the sub-datasets -------------------------------------------------------------------------------------------------

def _all() -> list[Dataset]:
    out = [Dataset(rule.name, "basic-computation", [rule], _decimals) for rule in ARITHMETIC]
    extended = "extended-calculation"
    for size in ("fixed", "variable"):
        fixed = size == "fixed"
        out += [Dataset(f"{size}-{name}", extended, rules, operands(fixed)) for name, rules, operands in (
            ("bits", BITWISE, _bits), ("shifts", SHIFTS, _bits), ("single-bits", SINGLE_BITS, _bits),
            ("count", COUNTS, _strings), ("strings", STRINGS, _strings))]
    out += [Dataset("subsequence", extended, SUBSEQUENCES, _subsequence), Dataset("lists", extended, LISTS, _lists),
            Dataset("list-counts", extended, LIST_COUNTS, _lists), Dataset("sets", extended, SETS, _sets),
            # The paper remaps these two no more than the other categories, and leaves them out of Delta.
            Dataset("dates", extended, DATES, _dates, ()), Dataset("square-root", extended, SQUARE_ROOT, _decimals, ())]
    for base in BASES:
        hint = f"Hint: numbers are written in base {NUMBER_WORDS[base]}.\n\n"
        convert = f"Hint: this is about base {NUMBER_WORDS[base]}.\n\n"
        out += [Dataset(rule.name.replace(" ", "-"), "number-base", [rule], _in_base(base),
                        hint=convert if rule.operator == "to_base" else hint) for rule in BASED[base]]
    out += [Dataset(name, "symbolic-abstraction", rules, _arguments) for name, rules in FUNCTIONS.items()]
    # Operations in a story are told in words: only its numbers can be remapped.
    out.append(Dataset("stories", "math-application", (), _stories, ("operands",), size=STORY_ITEMS))
    return out


DATASETS: dict[str, Dataset] = {dataset.name: dataset for dataset in _all()}
"""The 40 sub-datasets with original symbols."""

REMAPPED = [name for name, dataset in DATASETS.items()
            if dataset.category == "extended-calculation" and dataset.remappings]
"""The 14 sub-datasets whose remapped forms, three each, are the category symbolic reasoning."""
