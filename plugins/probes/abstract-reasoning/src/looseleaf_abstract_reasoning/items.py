"""Items as a model sees them: a few-shot prompt, an answer, and wrong answers beside it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from looseleaf.errors import did_you_mean

KINDS = ("original", "operators", "operands", "both")
"""Which symbols of an item were remapped."""

REMAPPINGS = KINDS[1:]
"""The kinds that Delta compares with the original."""

INSTRUCTION = ("Find the rule behind the examples and answer the last question by it. Symbols may not have their usual "
               "meaning.\n\n")
ANSWER = "Answer: The answer is"


@dataclass(frozen=True)
class Item:
    """One question with its demonstrations.

    Attributes:
        problem: name of what is asked; the remapped forms of an item have the same, and so are compared with it.
        dataset: sub-dataset.
        category: one of the paper's six, or your own.
        kind: one of :data:`KINDS`.
        prompt: the whole text up to where the answer goes; without white space at the end.
        answer: the right answer.
        choices: answers to choose from, the right one among them, all different.

    Raises:
        ValueError: choices that are equal, empty or without the answer; an unknown kind; an unusable prompt.
    """

    problem: str
    dataset: str
    category: str
    kind: str
    prompt: str
    answer: str
    choices: tuple[str, ...]

    def __post_init__(self) -> None:
        where = f"item {self.problem!r} ({self.kind})"
        if self.kind not in KINDS:
            raise ValueError(f"{where}: kind={self.kind!r}: allowed are {', '.join(KINDS)}."
                             + did_you_mean(self.kind, KINDS))
        if not self.prompt or self.prompt != self.prompt.rstrip():
            raise ValueError(f"{where}: the prompt ends in {self.prompt[-8:]!r}: allowed is a text without white space "
                             "at its end, as the answer brings its own")
        shown = [choice.strip() for choice in self.choices]
        if len(shown) < 2 or not all(shown):
            raise ValueError(f"{where}: choices={self.choices!r}: allowed are two answers or more, none of them empty")
        twice = sorted({choice for choice in shown if shown.count(choice) > 1})
        if twice:
            raise ValueError(f"{where}: the answer space has duplicates: {', '.join(map(repr, twice))} in "
                             f"{self.choices!r}. Give each answer once: of two equal ones none is the right one")
        if self.answer not in self.choices:
            raise ValueError(f"{where}: the answer {self.answer!r} is not among the choices {self.choices!r}: add it")

    @property
    def gold(self) -> int:
        """Place of the right answer among the choices."""
        return self.choices.index(self.answer)

    @property
    def continuations(self) -> list[str]:
        """The choices as they go on from the prompt: a space, the answer, a full stop.

        With the full stop an answer is whole: without it 12 would be no less likely than any number that begins so.
        """
        return [f" {choice}." for choice in self.choices]


def prompt_of(demonstrations: Iterable[tuple[str, str]], question: str, hint: str = "") -> str:
    """The few-shot prompt of section 4: demonstrations, then the question, all in one form."""
    shown = [f"Question: {asked}\n{ANSWER} {answer}." for asked, answer in demonstrations]
    return INSTRUCTION + hint + "\n\n".join([*shown, f"Question: {question}\n{ANSWER}"])


def check_items(items: Sequence[Item]) -> None:
    """Raise ValueError where there is nothing to measure, or an item appears twice."""
    if not items:
        raise ValueError("there are no items: give at least one")
    seen: dict[tuple[str, str], str] = {}
    prompts: dict[str, Item] = {}
    for item in items:
        if (item.problem, item.kind) in seen:
            raise ValueError(f"two items have problem={item.problem!r} and kind={item.kind!r}: give each problem a "
                             "name of its own")
        if item.prompt in prompts:
            raise ValueError(f"the items {prompts[item.prompt].problem!r} and {item.problem!r} have the same prompt: "
                             "leave one out")
        seen[item.problem, item.kind] = prompts.setdefault(item.prompt, item).prompt
    if not any(item.kind == "original" for item in items):
        raise ValueError("no item has kind='original', of which Gamma is the accuracy: give the original items too")


def to_json_lines(items: Iterable[Item]) -> str:
    """One JSON object a line, with ``continuations`` and the place of the right answer as ``gold``."""
    return "".join(json.dumps({**dataclasses.asdict(item), "continuations": item.continuations, "gold": item.gold},
                              ensure_ascii=False) + "\n" for item in items)


def from_json_lines(text: str) -> list[Item]:
    """The inverse of :func:`to_json_lines`; what follows from the rest may be absent.

    Raises:
        ValueError: a line that is no such object, with its number.
    """
    names = [field.name for field in dataclasses.fields(Item)]
    items = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            read: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON ({error}): allowed is one object a line with "
                             f"{', '.join(names)}") from error
        missing = [name for name in names if not isinstance(read, dict) or name not in read]
        if missing:
            raise ValueError(f"line {number} lacks {', '.join(missing)}: allowed is one object a line with "
                             f"{', '.join(names)}")
        if not isinstance(read["choices"], list):
            raise ValueError(f"line {number}: choices={read['choices']!r}: allowed is a list of texts")
        texts = {name: str(read[name]) for name in names if name != "choices"}
        items.append(Item(**texts, choices=tuple(map(str, read["choices"]))))
    return items
