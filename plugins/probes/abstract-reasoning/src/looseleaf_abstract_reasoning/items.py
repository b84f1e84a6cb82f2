"""Problems, their remapped symbols, and items as a model sees them; export to JSON lines and lm-evaluation-harness.

A problem keeps operands and operators apart, so that a remapping can exchange the symbols of either (section 4). It is
drawn for each problem and holds for all of its demonstrations, its question and its answers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from looseleaf.errors import did_you_mean
from looseleaf.files import lines, write_text
from looseleaf_abstract_reasoning.rules import Rule

KINDS = ("original", "operators", "operands", "both")
"""Which symbols of an item were remapped."""

REMAPPINGS = KINDS[1:]
"""The kinds that Delta compares with the original."""

INSTRUCTION = ("Find the rule behind the examples and answer the last question by it. Symbols may not have their usual "
               "meaning.\n\n")
ANSWER = "Answer: The answer is"
LONGEST_OPERATOR = 12
"""Characters of the random string that takes an operator's place: 1 to this many."""
GROUP = "looseleaf_abstract_reasoning"

T = TypeVar("T")
Role = Literal["operand", "operator", "words"]
Part = tuple[Role, str]
Question = tuple[Part, ...]


class RandomChoices:
    """A source of random choices that come out the same under every version of Python.

    The standard library promises the sequence of ``random.Random(text).random()`` for ever, but not that of ``sample``,
    ``shuffle`` and the like; so everything here is made of that one method.

    Args:
        seed: any text; equal texts give equal choices on every machine.
    """

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + int(self._random.random() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        """One of ``items``."""
        return items[self.integer(0, len(items) - 1)]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """``count`` of ``items`` without replacement, in random order."""
        left = list(items)
        return [left.pop(self.integer(0, len(left) - 1)) for _ in range(count)]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All of ``items`` in random order."""
        return self.some(items, len(items))

    def word(self, letters: Sequence[str], length: int) -> str:
        """``length`` of ``letters`` with replacement."""
        return "".join(self.pick(letters) for _ in range(length))


# ------------------------------------------------------------------------------------------------------------- items

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
            raise ValueError(f"{where}: kind: expected one of {', '.join(KINDS)}, got {self.kind!r}."
                             + did_you_mean(self.kind, KINDS))
        if not self.prompt or self.prompt != self.prompt.rstrip():
            raise ValueError(f"{where}: prompt: expected a text without white space at its end, as the answer brings "
                             f"its own, got one that ends in {self.prompt[-8:]!r}")
        choices = [choice.strip() for choice in self.choices]
        if len(choices) < 2 or not all(choices):
            raise ValueError(f"{where}: choices: expected two answers or more, none of them empty, got "
                             f"{self.choices!r}")
        duplicates = sorted({choice for choice in choices if choices.count(choice) > 1})
        if duplicates:
            raise ValueError(f"{where}: choices: expected an answer space without duplicates, got "
                             f"{', '.join(map(repr, duplicates))} twice in {self.choices!r}: of two equal answers none "
                             "is the right one")
        if self.answer not in self.choices:
            raise ValueError(f"{where}: choices: expected the answer {self.answer!r} among them, got {self.choices!r}: "
                             "add it")

    @property
    def gold(self) -> int:
        """Place of the right answer among the choices."""
        return self.choices.index(self.answer)

    @property
    def continuations(self) -> list[str]:
        """The choices as they go on from the prompt: a space, the answer, a full stop.

        The full stop ends an answer: without it 12 would be no less likely than any number that begins so.
        """
        return [f" {choice}." for choice in self.choices]


def prompt_of(demonstrations: Iterable[tuple[str, str]], question: str, hint: str = "") -> str:
    """The few-shot prompt of section 4: demonstrations, then the question, all in one form."""
    shown = [f"Question: {text}\n{ANSWER} {answer}." for text, answer in demonstrations]
    return INSTRUCTION + hint + "\n\n".join([*shown, f"Question: {question}\n{ANSWER}"])


def check_items(items: Sequence[Item]) -> None:
    """Check that there is something to measure.

    Raises:
        ValueError: no items, no originals, an item twice, or two items with one prompt.
    """
    if not items:
        raise ValueError("expected one item or more, got none")
    seen: set[tuple[str, str]] = set()
    prompts: dict[str, Item] = {}
    for item in items:
        if (item.problem, item.kind) in seen:
            raise ValueError("expected a name of its own for each problem, got two items with "
                             f"problem={item.problem!r} and kind={item.kind!r}")
        if item.prompt in prompts:
            raise ValueError(f"expected different prompts, got the same one in the items "
                             f"{prompts[item.prompt].problem!r} and {item.problem!r}: leave one out")
        seen.add((item.problem, item.kind))
        prompts[item.prompt] = item
    if not any(item.kind == "original" for item in items):
        raise ValueError("expected items with kind='original', of which Gamma is the accuracy, got remapped ones alone")


def to_json_lines(items: Iterable[Item]) -> str:
    """One JSON object a line, with ``continuations`` and the place of the right answer as ``gold``."""
    return "".join(json.dumps({**dataclasses.asdict(item), "continuations": item.continuations, "gold": item.gold},
                              ensure_ascii=False) + "\n" for item in items)


def from_json_lines(text: str) -> list[Item]:
    """Items from what :func:`to_json_lines` wrote; ``continuations`` and ``gold`` may be absent.

    Raises:
        ValueError: a line that is no such object, with its number.
    """
    names = [field.name for field in dataclasses.fields(Item)]
    expected = f"expected an object with {', '.join(names)}"
    items = []
    for number, line in enumerate(lines(text), 1):
        if not line.strip():
            continue
        try:
            entry: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {expected}, got no JSON ({error})") from error
        missing = [name for name in names if not isinstance(entry, dict) or name not in entry]
        if missing:
            raise ValueError(f"line {number}: {expected}, got none of {', '.join(missing)}")
        if not isinstance(entry["choices"], list):
            raise ValueError(f"line {number}: choices: expected a list of texts, got {entry['choices']!r}")
        texts = {name: str(entry[name]) for name in names if name != "choices"}
        items.append(Item(**texts, choices=tuple(map(str, entry["choices"]))))
    return items


# ---------------------------------------------------------------------------------------------------------- problems

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
        """All characters but the space in parts of these roles, in order; answers are operands."""
        texts = [text for question in self.questions for role, text in question if role in roles]
        return sorted(set("".join(texts + (self.answers if "operand" in roles else []))) - {" "})


def expression(rule: Rule, operands: Sequence[str]) -> Question:
    """``a operator b =``, or ``operator a =``. The sign of equality counts as an operand, as in the paper's data."""
    operator: Part = ("operator", rule.operator)
    space: Part = ("words", " ")
    first: tuple[Part, ...] = (("operand", operands[0]), space, operator) if rule.arity == 2 else (operator,)
    return (*first, space, ("operand", operands[-1]), space, ("operand", "="))


def story_question(text: str, numbers: Sequence[str]) -> Question:
    """A story with its numbers in place of ``#``."""
    words = text.split("#")
    parts: list[Part] = [("words", words[0])]
    for number, after in zip(numbers, words[1:], strict=True):
        parts += [("operand", number), ("words", after)]
    return tuple(part for part in parts if part[1])


def text_of(question: Question) -> str:
    """The question as it is read."""
    return "".join(text for _, text in question)


# ---------------------------------------------------------------------------------------------------------- remapping

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

    Args:
        problem: what is to be remapped.
        kind: one of :data:`KINDS`; of ``original`` nothing is remapped.
        seed: of the choice of letters.

    Raises:
        ValueError: an unknown kind, one that makes no sense of this problem, or too few letters left.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}.{did_you_mean(kind, KINDS)}")
    if kind == "original":
        return Remapping({}, {})
    if kind not in problem.remappings:
        raise ValueError(f"kind: expected one of {', '.join(('original', *problem.remappings))} for the problem "
                         f"{problem.name!r}, got {kind!r}")
    rng = RandomChoices(f"{seed}/{problem.name}/{kind}")
    used = set(problem.symbols("operand", "operator", "words"))
    free = [letter for letter in string.ascii_letters if letter not in used]
    operands: dict[str, str] = {}
    if kind in ("operands", "both"):
        symbols = problem.symbols("operand")
        if len(symbols) >= len(free):
            raise ValueError(f"problem {problem.name!r}: expected fewer symbols than the {len(free)} letters that are "
                             f"left for them and the operator, got {len(symbols)}")
        operands = dict(zip(symbols, rng.some(free, len(symbols)), strict=True))
    operators: dict[str, str] = {}
    if kind in ("operators", "both"):
        letters = [letter for letter in free if letter not in operands.values()]
        names = sorted({text for question in problem.questions for role, text in question if role == "operator"})
        while len(set(operators.values())) < len(names):  # two operators must not get one string
            operators = {name: rng.word(letters, rng.integer(1, LONGEST_OPERATOR)) for name in names}
    return Remapping(operands, operators)


def render(problem: Problem, kind: str = "original", seed: int = 0) -> Item:
    """The problem as an item, in its own symbols or remapped; remapped extended calculation is symbolic reasoning.

    Args:
        problem, kind, seed: as for :func:`draw_remapping`, whose errors it raises.
    """
    category = problem.category
    if kind != "original" and category == "extended-calculation":
        category = "symbolic-reasoning"
    new = draw_remapping(problem, kind, seed)
    shown = [(text_of(new.question(question)), new.operand(answer)) for question, answer in problem.demonstrations]
    return Item(problem.name, problem.dataset, category, kind,
                prompt_of(shown, text_of(new.question(problem.question)), problem.hint),
                new.operand(problem.answer), tuple(map(new.operand, problem.choices)))


# --------------------------------------------------------------------------------------------- lm-evaluation-harness

def export_harness(items: Sequence[Item], folder: str | os.PathLike[str], *, group: str = GROUP) -> list[str]:
    """Write ``items`` as multiple-choice tasks, one for each category and kind of remapping, and a group of all.

    The harness scores the same continuations of the same prompts as this package and takes the likeliest; so
    ``lm_eval --include_path FOLDER --tasks GROUP`` gives the same accuracies. The harness itself is not needed to write
    the files. They name the folder in full: where it is moved, export again.

    Args:
        items: see :meth:`AbstractReasoningProbe.items` and :func:`suite`.
        folder: where a YAML and a JSON-lines file of each task go; made if need be.
        group: name of the group, and beginning of the tasks' names.

    Returns:
        The names of the tasks.

    Raises:
        ValueError: no items, items twice, or a group name that is no name.
    """
    if not re.fullmatch(r"\w+", group):
        raise ValueError(f"group: expected letters, digits and underscores, got {group!r}")
    check_items(items)
    home = Path(folder).resolve()
    tasks: dict[str, list[Item]] = {}
    for item in items:
        category = re.sub(r"\W+", "_", item.category)
        tasks.setdefault(f"{group}_{category}_{item.kind}", []).append(item)
    for name, part in tasks.items():
        write_text(home / f"{name}.jsonl", to_json_lines(part))
        write_text(home / f"{name}.yaml", _task(name, home / f"{name}.jsonl"))
    listed = "".join(f"  - {name}\n" for name in tasks)
    write_text(home / f"{group}.yaml", f"group: {group}\ntask:\n{listed}metadata:\n  version: 1.0\n")
    return list(tasks)


def _task(name: str, data: Path) -> str:
    # JSON texts are YAML texts, with nothing left to escape
    return f"""task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {json.dumps(str(data))}
test_split: test
output_type: multiple_choice
num_fewshot: 0
doc_to_text: prompt
doc_to_choice: continuations
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
