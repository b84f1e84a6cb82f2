"""What is asked: problems of several steps, facts of two hops, and their JSON."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from typing import Any, Literal

from looseleaf import LooseleafError

Order = Literal["in order", "reversed", "shuffled", "subtrahend"]
ORDERS: tuple[Order, ...] = ("in order", "reversed", "shuffled", "subtrahend")
NAMES = "abcdefghjkmnpqrstuvwxyz"
DIGITS = tuple(str(n) for n in range(10))
"""Answers and intermediate results of :func:`chain`."""


class TooLittleDataError(LooseleafError, ValueError):
    """What is asked is too little for a measurement."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with steps between it and its answer.

    Attributes:
        question: begins with the premises, one space between them.
        answer: without a space before it.
        steps: the reasoning in words, one text a step; for the methods that replace it.
        results: what each step comes to, as text; the labels of :class:`~looseleaf_implicit_reasoning.StepProbe`.
        premises: the parts of the question after each of which it is asked what the model knows.
        kind: problems are reported by kind.
    """

    question: str
    answer: str
    steps: tuple[str, ...] = ()
    results: tuple[str, ...] = ()
    premises: tuple[str, ...] = ()
    kind: str = ""

    def __post_init__(self) -> None:
        for name in ("steps", "results", "premises"):  # lists, as they come from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.question or not self.answer:
            raise ValueError(f"Problem: expected a question and an answer, got {self.question!r} and {self.answer!r}")
        if not self.question.startswith(" ".join(self.premises)):
            raise ValueError(f"Problem.premises: expected the parts that the question begins with, got "
                             f"{list(self.premises)} and the question {self.question!r}")


@dataclasses.dataclass(frozen=True)
class TwoHop:
    """A fact that is reached over another: "the R2 of the R1 of E1".

    Attributes:
        e1, r1: an entity, and a relation that leads to the bridge.
        e2: the bridge, which must not be in the prompt.
        r2, e3: the second relation, and where it leads from the bridge.
        mention: how the bridge is described, with ``{r1}`` and ``{e1}``.
        prompt: the two-hop prompt, with ``{mention}`` and ``{r2}``.
        one_hop: the prompt that names the bridge, with ``{e2}`` and ``{r2}``.
        other_r1: a relation in the place of ``r1`` that does not lead to the bridge; empty: that of another fact.

    Raises:
        ValueError: the prompt does not describe the bridge, or names it.
    """

    e1: str
    r1: str
    e2: str
    r2: str
    e3: str
    mention: str = "the {r1} of {e1}"
    prompt: str = "The {r2} of {mention} is"
    one_hop: str = "The {r2} of {e2} is"
    other_r1: str = ""

    def __post_init__(self) -> None:
        if "{mention}" not in self.prompt or "{e1}" not in self.mention or "{r1}" not in self.mention:
            raise ValueError("TwoHop: expected a prompt with {mention} and a mention with {r1} and {e1}, so that the "
                             f"prompt describes the bridge, got {self.prompt!r} and {self.mention!r}")
        if "{e2}" not in self.one_hop:
            raise ValueError(f"TwoHop.one_hop: expected a prompt that names the bridge, {{e2}}, got {self.one_hop!r}")
        if not self.e2 or self.e2.casefold() in self.two_hop.casefold():
            raise ValueError(f"TwoHop.e2: expected a bridge that the prompt does not name, got {self.e2!r} in "
                             f"{self.two_hop!r}")

    @property
    def two_hop(self) -> str:
        """The whole prompt."""
        head, tail = self.split()
        return head + tail

    def split(self, e1: str = "", r1: str = "") -> tuple[str, str]:
        """The prompt up to the end of the mention, and the rest; with another entity or relation where given."""
        before, _, after = self.prompt.partition("{mention}")
        described = self.mention.format(e1=e1 or self.e1, r1=r1 or self.r1)
        return before.format(r2=self.r2) + described, after.format(r2=self.r2)

    @property
    def bridge_prompt(self) -> str:
        """The prompt that names the bridge."""
        return self.one_hop.format(e2=self.e2, r2=self.r2)


@dataclasses.dataclass(frozen=True)
class ReasoningData:
    """What a model is asked; what is empty is not measured.

    Attributes:
        problems: with one-token answers at best; all with as many premises and results.
        hops: two-hop facts.
        texts: running text, for :class:`~looseleaf_implicit_reasoning.LinearJump`.
    """

    problems: tuple[Problem, ...] = ()
    hops: tuple[TwoHop, ...] = ()
    texts: tuple[str, ...] = ()

    def to_json(self) -> str:
        """As text for the command line and for files."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str) -> ReasoningData:
        """What :meth:`to_json` wrote.

        Raises:
            ValueError: it is not such text.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            return cls(tuple(Problem(**p) for p in data.get("problems", ())),
                       tuple(TwoHop(**h) for h in data.get("hops", ())), tuple(data.get("texts", ())))
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise ValueError("data: expected JSON with problems, hops and texts (ReasoningData.to_json writes it), got "
                             f"{text[:80]!r} ({error})") from error


def chain(count: int, steps: int, order: Order = "in order", seed: int = 0) -> list[Problem]:
    """Problems of several additions and subtractions, the same ones in each order of premises.

    A variable is given, and each of ``steps`` others is the one before it plus or minus a number. All results are
    digits, drawn evenly. Of "subtrahend" problems each step takes the variable away from a number, with the same
    results; the other orders change where the premises stand and nothing else.

    Args:
        count: of problems.
        steps: of each, 1 or more.
        order: of the premises.
        seed: of the numbers, whatever the order.

    Raises:
        ValueError: an unknown order, or no step.
    """
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {', '.join(map(repr, ORDERS))}, got {order!r}")
    if not 1 <= steps < len(NAMES):
        raise ValueError(f"steps: expected an integer in [1, {len(NAMES) - 1}], got {steps!r}")
    draw, shuffle = random.Random(seed * 1009 + steps), random.Random(seed)
    return [_chain(draw, shuffle, steps, order) for _ in range(count)]


def _chain(draw: random.Random, shuffle: random.Random, steps: int, order: Order) -> Problem:
    names = draw.sample(NAMES, steps + 1)
    results = [draw.randrange(10)]
    for _ in range(steps):
        results.append(draw.choice([n for n in range(10) if n != results[-1]]))
    premises, worked = [f"{names[0]} = {results[0]}."], []
    for k in range(steps):
        before, after = results[k], results[k + 1]
        if order == "subtrahend":
            left, right = f"{before + after} - {names[k]}", f"{before + after} - {before}"
        else:
            sign = "+" if after > before else "-"
            left, right = f"{names[k]} {sign} {abs(after - before)}", f"{before} {sign} {abs(after - before)}"
        premises.append(f"{names[k + 1]} = {left}.")
        worked.append(f"{names[k + 1]} = {right} = {after}.")
    if order == "reversed":
        premises.reverse()
    elif order == "shuffled":
        shuffle.shuffle(premises)
    return Problem(f"{' '.join(premises)} {names[-1]} =", str(results[-1]), tuple(worked),
                   tuple(str(r) for r in results[1:]), tuple(premises), order)


_CAPITALS = (
    ("Paris", "France", "Europe"), ("Tokyo", "Japan", "Asia"), ("Cairo", "Egypt", "Africa"),
    ("Lima", "Peru", "South America"), ("Ottawa", "Canada", "North America"), ("Oslo", "Norway", "Europe"),
    ("Nairobi", "Kenya", "Africa"), ("Hanoi", "Vietnam", "Asia"), ("Berlin", "Germany", "Europe"),
    ("Havana", "Cuba", "North America"), ("Bangkok", "Thailand", "Asia"), ("Dublin", "Ireland", "Europe"))
_AUTHORS = (
    ("Hamlet", "Shakespeare", "England"), ("Don Quixote", "Cervantes", "Spain"), ("Faust", "Goethe", "Germany"),
    ("War and Peace", "Tolstoy", "Russia"), ("The Odyssey", "Homer", "Greece"), ("Ulysses", "Joyce", "Ireland"),
    ("Moby-Dick", "Melville", "America"), ("The Trial", "Kafka", "Prague"), ("Emma", "Austen", "England"),
    ("The Divine Comedy", "Dante", "Italy"))


def facts() -> list[TwoHop]:
    """Well-known facts of two hops, over countries and over authors; ours, where a probe is given none."""
    return [*(TwoHop(city, "country", country, "continent", continent, other_r1="river")
              for city, country, continent in _CAPITALS),
            *(TwoHop(book, "author", author, "homeland", home, other_r1="publisher")
              for book, author, home in _AUTHORS)]


def prose(count: int = 24, seed: int = 0) -> list[str]:
    """Paragraphs of the manual that comes with Python: running English text without any download."""
    from pydoc_data.topics import topics

    paragraphs = [" ".join(part.split()) for text in topics.values() for part in text.split("\n\n")]
    usable = sorted({p for p in paragraphs if len(p) > 200 and p[0].isupper() and p.endswith(".")})
    return random.Random(seed).sample(usable, min(count, len(usable)))


def shared_shape(problems: Sequence[Problem]) -> tuple[int, int]:
    """How many premises and results each of the problems has.

    Raises:
        TooLittleDataError: none, or not the same for all.
    """
    shapes = {(len(p.premises), len(p.results)) for p in problems}
    if len(shapes) != 1 or 0 in next(iter(shapes)):
        raise TooLittleDataError("problems: expected some with premises and results, as many in each, got "
                                 f"{sorted(shapes) or 'none'} (premises, results)")
    return next(iter(shapes))
