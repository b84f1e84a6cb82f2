"""The same problem with its premises in another order: is it reasoned through, or matched (Lin et al. 2025)?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from torch import nn

from looseleaf.modes import evaluating
from looseleaf.plugin import In, check_fields
from looseleaf.statistics import Interval, bootstrap
from looseleaf_implicit_reasoning.data import DIGITS, ORDERS, Order, Problem, chain
from looseleaf_text import LocalModel


class OrderScore(NamedTuple):
    """Accuracy on one kind of problem.

    Attributes:
        order, steps: the kind.
        right: 1 or 0 for each problem.
        frequency: accuracy of the most frequent answer of these problems, which it is given.
        last_number: accuracy of the last number of the question.
    """

    order: str
    steps: int
    right: list[float]
    frequency: float
    last_number: float

    def accuracy(self, seed: int = 0) -> Interval:
        """With its interval over problems."""
        return bootstrap(self.right, seed)


@dataclasses.dataclass
class PremiseOrder:
    """Accuracy by the order of premises and the number of steps (2503.07604, 2411.15862).

    Args:
        steps: of the problems.
        count: of problems for each order and number of steps; the same numbers in each order.
        demonstrations: solved problems of the same kind before each.
        orders: which.
    """

    steps: tuple[int, ...] = (1, 2, 3)
    count: Annotated[int, In(">= 1")] = 50
    demonstrations: Annotated[int, In(">= 0")] = 4
    orders: tuple[Order, ...] = ORDERS

    def __post_init__(self) -> None:
        check_fields(self)

    def problems(self, order: Order, steps: int, seed: int = 0) -> tuple[list[Problem], str]:
        """The problems of a kind, and the solved ones that stand before each."""
        made = chain(self.count + self.demonstrations, steps, order, seed)
        return made[self.demonstrations:], demonstrate(made[:self.demonstrations])

    def measure(self, model: nn.Module, tokenizer: Any, *, seed: int = 0) -> list[OrderScore]:
        """Ask for the likeliest digit after each question."""
        local = LocalModel(model, tokenizer)
        out = []
        with evaluating(model):
            for steps in self.steps:
                for order in self.orders:
                    problems, shown = self.problems(order, steps, seed)
                    out.append(score(order, steps, problems, choose(local, problems, DIGITS, shown)))
        return out


def demonstrate(problems: Sequence[Problem]) -> str:
    """Solved problems, one a line."""
    return "".join(f"{p.question} {p.answer}\n" for p in problems)


def choose(local: LocalModel, problems: Sequence[Problem], answers: Sequence[str], shown: str = "",
           after: str = "") -> list[str]:
    """The likeliest of the answers after each question; ``after`` stands between the question and the answer."""
    rows = local.score([f"{shown}{p.question}{after}" for p in problems], [[f" {a}" for a in answers]] * len(problems))
    return [answers[int(np.argmax(row))] for row in rows]


def score(order: str, steps: int, problems: Sequence[Problem], given: Sequence[str]) -> OrderScore:
    """What comes of the answers given."""
    answers = [p.answer for p in problems]
    right = [float(a == b) for a, b in zip(given, answers, strict=True)]
    last = [float(next(_numbers_backwards(p.question), "") == p.answer) for p in problems]
    return OrderScore(order, steps, right, max(map(answers.count, set(answers))) / len(answers),
                      sum(last) / len(last))


def _numbers_backwards(text: str) -> Iterator[str]:
    return (word.strip(".,;=") for word in reversed(text.split()) if word.strip(".,;=").isdigit())
