"""The paper's 82 sub-datasets, and their problems and items made anew from a seed: nothing is stored.

39 with original symbols and 42 with remapped ones have 96 items each; the word problems are 1,319 (as many as the
benchmark that the paper takes there), 9,095 in all.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from looseleaf.errors import did_you_mean
from looseleaf_abstract_reasoning.items import (
    REMAPPINGS,
    Item,
    Problem,
    Question,
    RandomChoices,
    expression,
    render,
    story_question,
)
from looseleaf_abstract_reasoning.rules import (
    ARITHMETIC,
    BASED,
    BASES,
    BITWISE,
    COUNTS,
    DATES,
    FUNCTIONS,
    LIBRARY,
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
    explaining,
    in_base,
    integer,
    numbers,
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

SHOTS, DIGITS, CHOICES = 8, 3, 4
ATTEMPTS = 1000


# -------------------------------------------------------------------------------------------------------- word problems

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ida", "Jon", "Kim", "Leo", "Mia", "Nora", "Omar",
         "Pia")
THINGS = ("apples", "books", "coins", "eggs", "flowers", "pens", "stamps", "stones", "tickets", "marbles")


@dataclass(frozen=True)
class Story:
    """A word problem without its numbers.

    Attributes:
        rule: the numbers, in the order of the text, to the answer.
        text: with ``{name}``, ``{other}``, ``{things}``, and ``#`` where a number goes.
        ranges: lowest and highest value of each number.
    """

    rule: Rule
    text: str
    ranges: tuple[tuple[int, int], ...]

    def draw(self, rng: RandomChoices) -> tuple[str, tuple[str, ...]]:
        """The text with names in it, and numbers for which the answer is an integer >= 1."""
        name, other = rng.some(NAMES, 2)
        text = self.text.format(name=name, other=other, things=rng.pick(THINGS))
        while True:
            operands = tuple(str(rng.integer(low, high)) for low, high in self.ranges)
            try:
                self.rule.apply(*operands)
            except ValueError:
                continue
            return text, operands


def numbers_in(text: str) -> tuple[str, ...]:
    """The numbers in a story, in order."""
    return tuple(re.findall(r"\d+", text))


def _story(text: str, ranges: tuple[tuple[int, int], ...], sum_: Callable[..., int | float]) -> Story:
    def apply(*operands: str) -> str:
        value = sum_(*map(integer, operands))
        if value < 1 or value != int(value):
            raise ValueError(f"expected an answer that is an integer >= 1, got {value}")
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

STORY_RULES = [story.rule for story in STORIES]


# ------------------------------------------------------------------------------------------------------------- operands

@dataclass(frozen=True)
class Setting:
    """What holds for all questions of a problem.

    Attributes:
        digits: most digits of numbers.
        letters: of strings.
    """

    digits: int
    letters: Sequence[str] = string.ascii_lowercase


Operands = Callable[[RandomChoices, Rule, Setting], tuple[str, ...]]


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


def _decimal(rng: RandomChoices, digits: int) -> int:
    """A number of 1 to ``digits`` digits, each length as likely as the others."""
    length = rng.integer(1, digits)
    return rng.integer(10 ** (length - 1), 10**length - 1)


def _decimals(rng: RandomChoices, rule: Rule, setting: Setting) -> tuple[str, ...]:
    return tuple(str(_decimal(rng, setting.digits)) for _ in range(rule.arity))


def _in_base(base: int) -> Operands:
    def operands(rng: RandomChoices, rule: Rule, setting: Setting) -> tuple[str, ...]:
        if rule.operator == "to_base":
            return str(_decimal(rng, setting.digits)), str(base)
        lengths = [rng.integer(1, setting.digits) for _ in range(2)]
        return tuple(in_base(rng.integer(base ** (n - 1), base**n - 1), base) for n in lengths)

    return operands


def _bits(fixed: bool) -> Operands:
    def operands(rng: RandomChoices, rule: Rule, setting: Setting) -> tuple[str, ...]:
        length = BITS if fixed else rng.integer(SHORTEST_BITS, BITS)
        strings = [rng.word("01", length) for _ in range(rule.arity)]
        if rule in SHIFTS or rule in SINGLE_BITS:
            strings[1] = str(rng.integer(0, length - 1))
        return tuple(strings)

    return operands


def _strings(fixed: bool) -> Operands:
    def operands(rng: RandomChoices, rule: Rule, setting: Setting) -> tuple[str, ...]:
        def text() -> str:
            return rng.word(setting.letters, LENGTH if fixed else rng.integer(SHORTEST, LENGTH))

        if rule in COUNTS:
            counted = text()
            return counted, rng.pick(counted)
        return tuple(text() for _ in range(rule.arity))

    return operands


def _subsequence(rng: RandomChoices, rule: Rule, setting: Setting) -> tuple[str, ...]:
    text, length, wanted = rng.word(setting.letters, LENGTH), rng.integer(2, 3), rng.pick("TF")
    while True:  # half of the questions are to be answered by yes
        places = sorted(rng.some(range(LENGTH), length))
        sought = "".join(text[k] for k in places) if wanted == "T" else rng.word(setting.letters, length)
        if rule.apply(text, sought) == wanted:
            return text, sought


def _lists(rng: RandomChoices, rule: Rule, setting: Setting) -> tuple[str, ...]:
    values = written([rng.integer(0, 9) for _ in range(rng.integer(3, 7))])
    return (values, str(rng.integer(0, 8))) if rule.arity == 2 else (values,)


def _sets(rng: RandomChoices, rule: Rule, setting: Setting) -> tuple[str, ...]:
    return tuple(written(sorted(rng.some(range(7), rng.integer(1, 6))), "{}") for _ in range(2))


def _dates(rng: RandomChoices, rule: Rule, setting: Setting) -> tuple[str, ...]:
    lengths = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
    dates = []
    for _ in range(2):
        year, month = rng.integer(2010, 2025), rng.integer(1, 12)
        leap = month == 2 and year % 4 == 0  # no century among these years
        dates.append(written([year, month, rng.integer(1, lengths[month - 1] + leap)]))
    return tuple(dates)


def _arguments(rng: RandomChoices, rule: Rule, setting: Setting) -> tuple[str, ...]:
    return (str(rng.integer(1, 99)),)


def _stories(rng: RandomChoices, rule: Rule, setting: Setting) -> tuple[str, ...]:
    raise NotImplementedError("stories draw their own numbers")


# ----------------------------------------------------------------------------------------------------- the sub-datasets

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
    # Operations in a story are written in words: only its numbers can be remapped.
    out.append(Dataset("stories", "math-application", (), _stories, ("operands",), size=STORY_ITEMS))
    return out


DATASETS: dict[str, Dataset] = {dataset.name: dataset for dataset in _all()}
"""The 40 sub-datasets with original symbols."""

REMAPPED = [name for name, dataset in DATASETS.items()
            if dataset.category == "extended-calculation" and dataset.remappings]
"""The 14 sub-datasets whose remapped forms, three each, are the category symbolic reasoning."""


# ------------------------------------------------------------------------------------------------------- wrong answers

def answer_choices(rule: Rule, alternatives: Sequence[Rule], operands: Sequence[str], seen: str, rng: RandomChoices,
                   count: int) -> tuple[str, ...]:
    """The right answer and wrong ones that look like right ones, in random order.

    First what other rules of the sub-dataset give for the same operands, then small edits of the right answer.

    Args:
        rule: the right one.
        alternatives: rules that the demonstrations rule out.
        operands: of the question.
        seen: characters of the demonstrations; a wrong answer has no other, or it would give itself away.
        rng: source of random choices.
        count: how many answers at most; a truth value has but two.
    """
    right = rule.apply(*operands)
    answers = [right]
    for other in rng.shuffled(alternatives):
        try:
            wrong = other.apply(*operands) if other.arity == len(operands) else right
        except ValueError:
            continue
        if wrong not in answers and other.answer == rule.answer and not set(wrong) - set(seen):
            answers.append(wrong)
    answers = answers[:count]
    for _ in range(50 * count):
        if len(answers) == count:
            break
        wrong = _edited(right, rule.answer, seen, rng)
        if wrong not in answers and not set(wrong) - set(seen):
            answers.append(wrong)
    return tuple(rng.shuffled(answers))


def _edited(right: str, kind: str, seen: str, rng: RandomChoices) -> str:
    if kind in ("list", "set"):
        return _edited_values(right, "[]" if kind == "list" else "{}", rng)
    if kind == "truth":
        return {"T": "F", "F": "T", "0": "1", "1": "0"}[right]
    if kind == "sign":
        return {"1": "-1", "-1": "1"}[right]
    if kind == "bits":
        alphabet = "01"
    elif kind == "number":
        alphabet = "".join(character for character in "0123456789" if character in seen)
    else:
        alphabet = "".join(character for character in seen if character.isalpha())
    places = [k for k, character in enumerate(right) if character.isalnum()]
    k = rng.pick(places)
    other = rng.pick(places)
    if rng.integer(0, 1) and right[k] != right[other]:  # exchange two characters
        edited = list(right)
        edited[k], edited[other] = edited[other], edited[k]
        text = "".join(edited)
    else:
        text = right[:k] + rng.pick(alphabet) + right[k + 1:]
    return right if kind == "number" and _odd_number(text) else text


def _odd_number(text: str) -> bool:
    """Whether nobody would write a number so: 012, 1.50, -0."""
    bare = text.lstrip("-")
    return (bare[0] == "0" and len(bare) > 1 and bare[1] != ".") or ("." in bare and bare[-1] == "0") or text == "-0"


def _edited_values(right: str, brackets: str, rng: RandomChoices) -> str:
    """A list or set with one value dropped, added or another."""
    values = numbers(right, brackets)
    highest = 9 if brackets == "[]" else 6
    k, value, how = rng.integer(0, len(values)), rng.integer(0, highest), rng.pick(("drop", "add", "other"))
    if k == len(values) or how == "add":
        values.insert(k, value)
    elif how == "drop":
        values.pop(k)
    else:
        values[k] = value
    return written(sorted(set(values)) if brackets == "{}" else values, brackets)


# -------------------------------------------------------------------------------------------------- problems and items

def problems(dataset: str, count: int | None = None, *, seed: int = 0, shots: int = SHOTS, digits: int = DIGITS,
             choices: int = CHOICES) -> list[Problem]:
    """Problems of one sub-dataset, no two of which ask the same.

    Every problem can be solved: its demonstrations leave no rule that answers its question otherwise, and they show
    every symbol of its question and its answer.

    Args:
        dataset: one of :data:`DATASETS`.
        count: how many; None: as many as the full suite has.
        seed: equal seeds give equal problems on every machine. The first problems do not depend on ``count``.
        shots: demonstrations of each, 4 to 50.
        digits: most digits of numbers in the categories of arithmetic, 3 to 9.
        choices: most answers to choose from, 2 to 10.

    Raises:
        ValueError: an unknown sub-dataset, or a size out of range.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset: expected one of {', '.join(DATASETS)}, got {dataset!r}."
                         + did_you_mean(dataset, DATASETS))
    source = DATASETS[dataset]
    count = source.size if count is None else count
    for name, value, low, high in (("count", count, 1, source.size), ("shots", shots, 4, 50), ("digits", digits, 3, 9),
                                   ("choices", choices, 2, 10)):
        if not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name}: expected an integer in [{low}, {high}], got {value!r}")
    out: list[Problem] = []
    seen: set[tuple[str, Question]] = set()
    for number in range(count):
        rng = RandomChoices(f"{seed}/{dataset}/{number}")
        for _ in range(ATTEMPTS):
            problem = _attempt(source, f"{dataset}/{number}", rng, shots, digits, choices)
            if problem is not None and (problem.rule, problem.question) not in seen:
                break
        else:
            raise ValueError(f"{dataset}: expected a new problem within {ATTEMPTS} attempts, got none: use more digits "
                             f"than {digits}, or other shots than {shots}")
        seen.add((problem.rule, problem.question))
        out.append(problem)
    return out


def _attempt(dataset: Dataset, name: str, rng: RandomChoices, shots: int, digits: int, choices: int) -> Problem | None:
    """A problem, or None where chance drew one that cannot be solved."""
    rule, cases = _cases(dataset, rng, shots, digits)
    question, operands = cases[-1]
    pairs = [(shown, rule.apply(*shown)) for _, shown in cases[:-1]]
    answer = rule.apply(*operands)
    demonstrations = tuple((case[0], pair[1]) for case, pair in zip(cases, pairs, strict=False))
    seen = "".join(sorted({character for shown, right in demonstrations
                           for role, text in (*shown, ("operand", right)) if role == "operand" for character in text}))
    needed = {character for role, text in question if role == "operand" for character in text} | set(answer)
    if needed - set(seen) or not _determined(rule, pairs, operands, answer):
        return None
    answers = answer_choices(rule, dataset.rules, operands, seen, rng, choices)
    if len(answers) < 2:
        return None
    return Problem(name, dataset.name, dataset.category, rule.name, demonstrations, question, answer, answers,
                   dataset.hint, dataset.remappings)


def _cases(dataset: Dataset, rng: RandomChoices, shots: int,
           digits: int) -> tuple[Rule, list[tuple[Question, tuple[str, ...]]]]:
    """A rule, and different questions about it with their operands, one more than ``shots``."""
    if not dataset.rules:
        story = rng.pick(STORIES)
        rule = story.rule
    else:
        rule = rng.pick(dataset.rules)
        setting = Setting(digits, rng.some(Setting(digits).letters, LETTERS))
    cases: dict[Question, tuple[str, ...]] = {}
    while len(cases) <= shots:
        if not dataset.rules:
            text, operands = story.draw(rng)
            cases[story_question(text, operands)] = operands
            continue
        operands = dataset.operands(rng, rule, setting)
        try:
            rule.apply(*operands)
        except ValueError:  # not a case of this rule, such as division by zero
            continue
        cases[expression(rule, operands)] = operands
    return rule, list(cases.items())


def _determined(rule: Rule, pairs: Sequence[tuple[tuple[str, ...], str]], operands: tuple[str, ...],
                answer: str) -> bool:
    """Whether all rules that explain the demonstrations answer the question alike."""
    answers = set()
    for other in explaining(LIBRARY if rule.operator else STORY_RULES, pairs):
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
        originals = problems(name, seed=seed, shots=shots, digits=digits, choices=choices)
        yield from (render(problem) for problem in originals)
        if name in REMAPPED:
            for kind in REMAPPINGS:
                yield from (render(problem, kind, seed) for problem in originals)
