"""The abstraction test: other symbols, the same rule (section 4).

A remapping is drawn for each problem and holds for all of its demonstrations, its question and its answers.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

from looseleaf.errors import did_you_mean
from looseleaf_abstract_reasoning.draw import Draw
from looseleaf_abstract_reasoning.items import KINDS, Item, prompt_of
from looseleaf_abstract_reasoning.problems import Problem, Question, text_of

LONGEST_OPERATOR = 12
"""Characters of the random string that takes an operator's place: 1 to this many."""


@dataclass(frozen=True)
class Remapping:
    """Other symbols for the same things.

    Attributes:
        operands: character -> letter; one to one. Characters that are absent, and spaces, stay.
        operators: operator -> random string.
    """

    operands: dict[str, str]
    operators: dict[str, str]

    def operand(self, text: str) -> str:
        """An operand or answer in the new symbols."""
        return "".join(self.operands.get(character, character) for character in text)

    def question(self, question: Question) -> Question:
        """A question in the new symbols; words stay."""
        return tuple((role, self.operand(text) if role == "operand" else
                      self.operators.get(text, text) if role == "operator" else text) for role, text in question)

    def inverse(self) -> dict[str, str]:
        """Letter -> character of the operands: the key to read them by."""
        return {image: character for character, image in self.operands.items()}


def draw_remapping(problem: Problem, kind: str, seed: int = 0) -> Remapping:
    """A random remapping of ``problem``; equal arguments give the same one on every machine.

    Letters that already occur in the problem's questions and answers are never images, so that what was remapped
    leaves none of its symbols behind, and new operators share no letter with operands, old or new.

    Raises:
        ValueError: an unknown kind, one that makes no sense of this problem, or too few letters left.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: allowed are {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}")
    if kind == "original":
        return Remapping({}, {})
    if kind not in problem.remappings:
        raise ValueError(f"problem {problem.name!r} has no remapping {kind!r}: allowed are "
                         f"{', '.join(('original', *problem.remappings))}")
    draw = Draw(f"{seed}/{problem.name}/{kind}")
    taken = set(problem.symbols("operand", "operator", "words"))
    free = [letter for letter in string.ascii_letters if letter not in taken]
    operands: dict[str, str] = {}
    if kind in ("operands", "both"):
        symbols = problem.symbols("operand")
        if len(symbols) >= len(free):
            raise ValueError(f"problem {problem.name!r} has {len(symbols)} symbols, but only {len(free)} letters are "
                             "left for them and its operator: use fewer")
        operands = dict(zip(symbols, draw.some(free, len(symbols)), strict=True))
    operators: dict[str, str] = {}
    if kind in ("operators", "both"):
        letters = [letter for letter in free if letter not in operands.values()]
        names = sorted({text for question in problem.questions for role, text in question if role == "operator"})
        while len(set(operators.values())) < len(names):  # two operators must not get one string
            operators = {name: draw.word(letters, draw.whole(1, LONGEST_OPERATOR)) for name in names}
    return Remapping(operands, operators)


def render(problem: Problem, kind: str = "original", seed: int = 0) -> Item:
    """The problem as an item, in its own symbols or remapped; remapped extended calculation is symbolic reasoning."""
    category = problem.category
    if kind != "original" and category == "extended-calculation":
        category = "symbolic-reasoning"
    new = draw_remapping(problem, kind, seed)
    shown = [(text_of(new.question(question)), new.operand(answer)) for question, answer in problem.demonstrations]
    return Item(problem.name, problem.dataset, category, kind,
                prompt_of(shown, text_of(new.question(problem.question)), problem.hint),
                new.operand(problem.answer), tuple(map(new.operand, problem.choices)))
