"""Problems: a rule, demonstrations of it and a question, with operands and operators kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from looseleaf_abstract_reasoning.rules import Rule

Role = Literal["operand", "operator", "words"]
Part = tuple[Role, str]
Question = tuple[Part, ...]


@dataclass(frozen=True)
class Problem:
    """What is asked, before it is rendered as an :class:`Item`.

    Attributes:
        name: sub-dataset and number, such as ``add/17``.
        dataset, category: see :class:`Item`.
        rule: name of the rule that the demonstrations show.
        demonstrations: (question, answer) pairs.
        question: the last question.
        answer: its right answer.
        choices: answers to choose from.
        hint: a sentence before the demonstrations.
        remappings: the kinds of remapping that make sense of it.
    """

    name: str
    dataset: str
    category: str
    rule: str
    demonstrations: tuple[tuple[Question, str], ...]
    question: Question
    answer: str
    choices: tuple[str, ...]
    hint: str = ""
    remappings: tuple[str, ...] = ()

    @property
    def questions(self) -> list[Question]:
        """All questions, the last one last."""
        return [*(question for question, _ in self.demonstrations), self.question]

    @property
    def answers(self) -> list[str]:
        """Answers of the demonstrations, and all choices."""
        return [*(answer for _, answer in self.demonstrations), *self.choices]

    def symbols(self, *roles: Role) -> list[str]:
        """All characters in parts of these roles, but the space, in order; answers are operands."""
        texts = [text for question in self.questions for role, text in question if role in roles]
        return sorted(set("".join(texts + (self.answers if "operand" in roles else []))) - {" "})


def expression(rule: Rule, operands: Sequence[str]) -> Question:
    """``a operator b =``, or ``operator a =``. The sign of equality counts as an operand, as in the paper's data."""
    operator: Part = ("operator", rule.operator)
    space: Part = ("words", " ")
    first: tuple[Part, ...] = (("operand", operands[0]), space, operator) if rule.arity == 2 else (operator,)
    return (*first, space, ("operand", operands[-1]), space, ("operand", "="))


def told(text: str, numbers: Sequence[str]) -> Question:
    """A story with its numbers in place of ``#``."""
    words = text.split("#")
    parts: list[Part] = [("words", words[0])]
    for number, after in zip(numbers, words[1:], strict=True):
        parts += [("operand", number), ("words", after)]
    return tuple(part for part in parts if part[1])


def text_of(question: Question) -> str:
    """The question as it is read."""
    return "".join(text for _, text in question)
