"""Word problems: stories told of numbers, with the sum that answers them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from looseleaf_abstract_reasoning.draw import Draw
from looseleaf_abstract_reasoning.rules import Rule, whole

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ida", "Jon", "Kim", "Leo", "Mia", "Nora", "Omar",
         "Pia")
THINGS = ("apples", "books", "coins", "eggs", "flowers", "pens", "stamps", "stones", "tickets", "marbles")


@dataclass(frozen=True)
class Story:
    """A word problem without its numbers.

    Attributes:
        rule: the numbers, in the order in which the text tells them, to the answer.
        text: with ``{name}``, ``{other}``, ``{things}``, and ``#`` where a number goes.
        ranges: lowest and highest value of each number.
    """

    rule: Rule
    text: str
    ranges: tuple[tuple[int, int], ...]

    def draw(self, draw: Draw) -> tuple[str, tuple[str, ...]]:
        """The text with names in it, and numbers for which the answer is a whole number from 1."""
        name, other = draw.some(NAMES, 2)
        text = self.text.format(name=name, other=other, things=draw.pick(THINGS))
        while True:
            numbers = tuple(str(draw.whole(low, high)) for low, high in self.ranges)
            try:
                self.rule.apply(*numbers)
            except ValueError:
                continue
            return text, numbers


def numbers_in(text: str) -> tuple[str, ...]:
    """The numbers of a told story, in order."""
    return tuple(re.findall(r"\d+", text))


def _story(text: str, ranges: tuple[tuple[int, int], ...], sum_: Callable[..., int | float]) -> Story:
    def apply(*operands: str) -> str:
        value = sum_(*map(whole, operands))
        if value < 1 or value != int(value):
            raise ValueError(f"{value} is not a whole number from 1")
        return str(int(value))

    return Story(Rule(f"story: {text}", "", len(ranges), apply), text, ranges)


_FEW, _SOME, _MANY = (2, 9), (5, 30), (40, 99)
STORIES = [
    _story("{name} has # {things} and buys # bags of # {things} each. How many {things} does {name} have now?",
           (_SOME, _FEW, _FEW), lambda a, b, c: a + b * c),
    _story("{name} had # {things}, gave # to {other} and shared the rest evenly among # friends. "
           "How many {things} did each friend get?", (_MANY, _SOME, _FEW), lambda a, b, c: (a - b) / c),
    _story("A shop sells {things} in boxes of #. {name} orders # boxes, and # of the {things} arrive broken. "
           "How many good {things} arrive?", (_SOME, _FEW, _FEW), lambda a, b, c: a * b - c),
    _story("{name} earns # dollars an hour and works # hours a day for # days. How many dollars does {name} earn?",
           (_SOME, _FEW, _FEW), lambda a, b, c: a * b * c),
    _story("{name} reads # pages on Monday and # pages on Tuesday. The book has # pages. How many pages are left?",
           (_SOME, _SOME, (61, 99)), lambda a, b, c: c - a - b),
    _story("{name} has # dollars. A cup of tea costs # dollars, and {name} buys # cups. "
           "How many dollars are left?", (_MANY, _FEW, _FEW), lambda a, b, c: a - b * c),
    _story("There are # rows of # seats in a hall, and # people sit down. How many seats stay empty?",
           (_SOME, _SOME, _MANY), lambda a, b, c: a * b - c),
    _story("{name} has # {things}, and {other} has # times as many. How many {things} do they have together?",
           (_SOME, _FEW), lambda a, b: a + a * b),
    _story("{name} is # years old, and {other} is # years older. How old will {other} be in # years?",
           (_SOME, _FEW, _SOME), lambda a, b, c: a + b + c),
    _story("{name} walks # miles a day on weekdays and # miles a day at the weekend. "
           "How many miles does {name} walk in a week?", (_FEW, _FEW), lambda a, b: 5 * a + 2 * b),
    _story("A train with # people stops. Then # people leave and # people enter. How many people are on it now?",
           (_MANY, _SOME, _SOME), lambda a, b, c: a - b + c),
    _story("{name} bakes # trays of # buns and packs them in bags of #. How many bags does {name} fill?",
           (_SOME, _FEW, _FEW), lambda a, b, c: a * b / c),
    _story("{name} and {other} plant # trees each. Each tree bears # pears, and # pears fall down. "
           "How many pears are still on the trees?", (_FEW, _SOME, _SOME), lambda a, b, c: 2 * a * b - c),
    _story("A farmer has # cows and # hens. How many legs do they have together?", (_SOME, _SOME),
           lambda a, b: 4 * a + 2 * b),
    _story("{name} saves # dollars a week. A bike costs # dollars, and {name} has # dollars already. "
           "How many weeks must {name} save?", (_FEW, (61, 99), _SOME), lambda a, b, c: (b - c) / a),
    _story("{name} cuts a rope of # feet into # equal parts and uses # of them. How many feet are used?",
           (_MANY, _FEW, _FEW), lambda a, b, c: a / b * c if c < b else 0),
]
"""Two or three steps each."""
