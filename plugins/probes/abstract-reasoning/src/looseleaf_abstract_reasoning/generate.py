"""Problems and the full suite, made anew from a seed: nothing is stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from looseleaf.errors import did_you_mean
from looseleaf_abstract_reasoning.choices import choices_for
from looseleaf_abstract_reasoning.datasets import DATASETS, LETTERS, REMAPPED, Dataset, Setting
from looseleaf_abstract_reasoning.draw import Draw
from looseleaf_abstract_reasoning.items import REMAPPINGS, Item
from looseleaf_abstract_reasoning.problems import Problem, Question, expression, told
from looseleaf_abstract_reasoning.remap import render
from looseleaf_abstract_reasoning.rules import LIBRARY, Rule, explaining
from looseleaf_abstract_reasoning.stories import STORIES

STORY_RULES = [story.rule for story in STORIES]
SHOTS, DIGITS, CHOICES = 8, 3, 4
ATTEMPTS = 1000
Case = tuple[Question, tuple[str, ...]]
"""A question and its operands."""


def problems(dataset: str, count: int | None = None, *, seed: int = 0, shots: int = SHOTS, digits: int = DIGITS,
             choices: int = CHOICES) -> list[Problem]:
    """Problems of one sub-dataset, no two of which ask the same.

    Every problem can be solved: its demonstrations leave no rule that answers its question otherwise, and they show
    every symbol of its question and its answer.

    Args:
        dataset: one of :data:`DATASETS`.
        count: how many; None: as many as the full suite has.
        seed: equal seeds give equal problems on every machine. The first problems do not depend on ``count``.
        shots: demonstrations of each.
        digits: most digits of numbers in the categories of arithmetic.
        choices: most answers to choose from.

    Raises:
        ValueError: an unknown sub-dataset, or a size out of range.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset={dataset!r} is unknown: allowed are {', '.join(DATASETS)}."
                         + did_you_mean(dataset, DATASETS))
    made = DATASETS[dataset]
    count = made.size if count is None else count
    for name, value, low, high in (("count", count, 1, made.size), ("shots", shots, 4, 50), ("digits", digits, 3, 9),
                                   ("choices", choices, 2, 10)):
        if not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name}={value!r}: allowed is a whole number from {low} to {high}")
    out: list[Problem] = []
    asked: set[tuple[str, Question]] = set()
    for number in range(count):
        draw = Draw(f"{seed}/{dataset}/{number}")
        for _ in range(ATTEMPTS):
            problem = _attempt(made, f"{dataset}/{number}", draw, shots, digits, choices)
            if problem is not None and (problem.rule, problem.question) not in asked:
                break
        else:
            raise ValueError(f"no new problem of {dataset!r} was found: use more digits than {digits}, or other shots "
                             f"than {shots}")
        asked.add((problem.rule, problem.question))
        out.append(problem)
    return out


def _attempt(dataset: Dataset, name: str, draw: Draw, shots: int, digits: int, choices: int) -> Problem | None:
    """A problem, or None where chance drew one that cannot be solved."""
    rule, cases = _cases(dataset, draw, shots, digits)
    shown, (question, operands) = cases[:-1], cases[-1]
    pairs = [(case[1], rule.apply(*case[1])) for case in shown]
    answer = rule.apply(*operands)
    demonstrations = tuple((case[0], pair[1]) for case, pair in zip(shown, pairs, strict=True))
    seen = "".join(sorted({character for asked, right in demonstrations
                           for role, text in (*asked, ("operand", right)) if role == "operand" for character in text}))
    needed = {character for role, text in question if role == "operand" for character in text} | set(answer)
    if needed - set(seen) or not _determined(rule, pairs, operands, answer):
        return None
    given = choices_for(rule, dataset.rules, operands, seen, draw, choices)
    if len(given) < 2:
        return None
    return Problem(name, dataset.name, dataset.category, rule.name, demonstrations, question, answer, given,
                   dataset.hint, dataset.remappings)


def _cases(dataset: Dataset, draw: Draw, shots: int, digits: int) -> tuple[Rule, list[Case]]:
    """A rule and different questions about it, one more than ``shots``."""
    if not dataset.rules:
        story = draw.pick(STORIES)
        rule = story.rule
    else:
        rule = draw.pick(dataset.rules)
        setting = Setting(digits, draw.some(Setting(digits).letters, LETTERS))
    cases: dict[Question, tuple[str, ...]] = {}
    while len(cases) <= shots:
        if not dataset.rules:
            text, operands = story.draw(draw)
            cases[told(text, operands)] = operands
            continue
        operands = dataset.operands(draw, rule, setting)
        try:
            rule.apply(*operands)
        except ValueError:  # not a case of this rule, such as division by zero
            continue
        cases[expression(rule, operands)] = operands
    return rule, list(cases.items())


def _determined(rule: Rule, pairs: Sequence[tuple[tuple[str, ...], str]], operands: tuple[str, ...],
                answer: str) -> bool:
    """Whether all rules that explain the demonstrations answer the question alike."""
    rules = LIBRARY if rule.operator else STORY_RULES
    answers = set()
    for other in explaining(rules, pairs):
        try:
            answers.add(other.apply(*operands))
        except ValueError:
            answers.add("")
    return answers == {answer}


def suite(seed: int = 0, *, shots: int = SHOTS, digits: int = DIGITS, choices: int = CHOICES) -> Iterator[Item]:
    """The full set of the paper: 9,095 items in 82 sub-datasets.

    Args:
        seed, shots, digits, choices: as for :func:`problems`.

    Yields:
        the items with original symbols; each sub-dataset of extended calculation that is remapped is followed by its
        three forms, which belong to symbolic reasoning.
    """
    for name in DATASETS:
        made = problems(name, seed=seed, shots=shots, digits=digits, choices=choices)
        yield from (render(problem) for problem in made)
        if name in REMAPPED:
            for kind in REMAPPINGS:
                yield from (render(problem, kind, seed) for problem in made)
