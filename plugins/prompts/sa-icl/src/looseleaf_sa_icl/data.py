"""Four-option questions whose kind is known, with explanations and schemas by rule; and a planted case."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from looseleaf import Example
from looseleaf_sa_icl.problem import CANDIDATES, multiple_choice
from looseleaf_sa_icl.schema import Schema
from looseleaf_text import LanguageModel, TextTask

LABELS = {"1": "1", "2": "2", "3": "3", "4": "4"}
FIELDS = ("broad_category", "refinement", "specific_scope", "goal")


@dataclasses.dataclass(frozen=True)
class Kind:
    """Questions of one generator.

    Attributes:
        subject: several kinds have the same.
        name: of the generator.
        schema: what every question of the kind is, by rule.
        facts: (question, right answer, explanation) of each.
        wrong: other answers to a question with this answer, three or more.
    """

    subject: str
    name: str
    schema: Schema
    facts: Sequence[tuple[str, str, str]]
    wrong: Callable[[str, random.Random], list[str]]

    def draw(self, rng: random.Random, count: int, explained: bool) -> list[Example]:
        """Different questions of the kind; ``id`` and ``kind`` are inputs that are not shown."""
        out = []
        for question, answer, why in rng.sample(list(self.facts), count):
            wrong = [w for w in dict.fromkeys(self.wrong(answer, rng)) if w.casefold() != answer.casefold()][:3]
            more = {"explanation": why} if explained else {}
            out.append(multiple_choice(question, answer, wrong, seed=rng.randrange(2**30), kind=self.name, **more))
        return out


def kinds(quiz: Sequence[Mapping[str, Any]], generated: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Kind]:
    """Ten kinds of questions in four subjects.

    Args:
        quiz: rows with ``topic`` and ``answers``, field -> texts.
        generated: name of a generator of reasoning-gym -> its problems, with ``question`` and ``answer``.
    """
    def looked_up(subject: str, name: str, topic: str, given: str, wanted: str, question: str, why: str,
                  schema: Sequence[str]) -> Kind:
        pairs = {row["answers"][given][0]: row["answers"][wanted][0] for row in quiz
                 if row["topic"] == topic and row["answers"].get(given) and row["answers"].get(wanted)}
        answers = sorted(set(pairs.values()), key=str.casefold)
        facts = [(question.format(x), y, why.format(x, y)) for x, y in sorted(pairs.items())]
        return Kind(subject, name, dict(zip(FIELDS, schema, strict=True)), facts, lambda _, rng: rng.sample(answers, 4))

    def computed(name: str, generator: str, why: str, schema: Sequence[str]) -> Kind:
        facts = [(" ".join(p["question"].split()), str(p["answer"]), why.format(p["answer"]))
                 for p in generated[generator]]

        def wrong(answer: str, rng: random.Random) -> list[str]:
            steps = rng.sample([1, 2, 3, 4, 6, 10], 4)
            return [str(int(answer) + step * rng.choice([-1, 1] if int(answer) >= step else [1])) for step in steps]

        unique = {question: fact for fact in facts for question in [fact[0]]}
        return Kind("arithmetic", name, dict(zip(FIELDS, schema, strict=True)), list(unique.values()), wrong)

    return [
        looked_up("chemistry", "symbol", "elements", "element", "symbol", "What is the chemical symbol of {}?",
                  "The symbol of {} in the periodic table is {}.",
                  ("Chemistry > elements", "symbols of elements", "from an element to its symbol", "a symbol")),
        looked_up("chemistry", "atomic number", "elements", "number", "element",
                  "Which chemical element has the atomic number {}?", "With {} protons an atom is one of {}.",
                  ("Chemistry > elements", "atomic numbers", "from a number of protons to the element", "an element")),
        looked_up("geography", "capital of a country", "capitals", "country", "capital", "What is the capital of {}?",
                  "The government of {} sits in {}.",
                  ("Geography > cities", "capitals of countries", "from a country to its capital", "a city")),
        looked_up("geography", "capital of a state", "states", "state", "capital",
                  "What is the capital of the American state of {}?", "The legislature of {} meets in {}.",
                  ("Geography > cities", "capitals of American states", "from a state to its capital", "a city")),
        looked_up("language", "young animal", "young", "adult", "young", "What is the young of the {} called?",
                  "A young {} is called a {}.",
                  ("Language > animals", "names of young animals", "from an adult to its young", "a noun")),
        looked_up("language", "group", "collectives", "individuals", "collective", "What is a group of {} called?",
                  "Many {} together are called a {}.",
                  ("Language > nouns", "collective nouns", "from the members to the name of the group", "a noun")),
        looked_up("language", "flower", "flowers", "flower", "meaning",
                  "In the language of flowers, what does this stand for: {}?", "By convention, {} stands for: {}.",
                  ("Language > symbols", "meanings of flowers", "from a flower to its meaning", "a phrase")),
        computed("legs", "leg_counting", "Multiply each number of animals by its legs and add: {}.",
                 ("Mathematics > word problems", "sums of products", "animals and their legs", "a whole number")),
        computed("sum", "chain_sum", "Add and subtract from left to right: {}.",
                 ("Mathematics > arithmetic", "sums and differences", "two or three numbers", "a whole number")),
        computed("letters", "letter_counting", "Go through the text and count each time it occurs: {}.",
                 ("Mathematics > counting", "occurrences in a text", "one letter in a phrase", "a whole number")),
    ]


def question_task(all_kinds: Sequence[Kind], each: int, seed: int, *, explained: bool = False) -> TextTask:
    """``each`` questions of every kind to train on and as many to test on; no question is in both."""
    train: list[Example] = []
    test: list[Example] = []
    for kind in all_kinds:
        drawn = kind.draw(random.Random(f"{seed} {kind.name}"), 2 * each, explained)
        train += drawn[:each]
        test += drawn[each:]
    order = random.Random(seed)
    order.shuffle(train)
    order.shuffle(test)
    return TextTask("questions of known kinds", train, test=test, labels=LABELS)


class PlantedModel(LanguageModel):
    """A pupil that knows no code, but writes down the shift of one that it sees solved, and uses what is written.

    A planted case whose answer is known: with a schema of the right code in view it is always right; else it takes the
    first candidate.
    """

    name = "planted"

    def generate(self, prompts: list[str], max_tokens: int, stop: list[str] | None = None, temperature: float = 0.0,
                 seed: int = 0) -> list[str]:
        """A schema of the code in the prompt, its shift where it can be seen."""
        self.calls += len(prompts)
        out = []
        for prompt in prompts:
            code, number = re.findall(r"In the (\w+) code, what does (\d+) become", prompt)[0]
            solved = re.search(r"The answer is: (\d+)", prompt)
            written = re.findall(rf"the {code} code adds (\d+)", prompt)
            shift = written[-1] if written else "?"
            if solved and "example" not in prompt:
                shift = str(int(solved[1]) - int(number))
            out.append(f"broad_category: codes\nrefinement: {code}\nspecific_scope: {code}\n"
                       f"goal: the {code} code adds {shift}")
        return out

    def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
        """The candidate that the refined schema leads to; the first where it leads to none."""
        self.calls += len(prefixes)
        rows = []
        for prefix, row in zip(prefixes, continuations, strict=True):
            code, number, listed = re.findall(
                r"In the (\w+) code, what does (\d+) become\?\nCandidates:\n((?:\d\. \d+\n?)+)", prefix)[-1]
            written = re.findall(rf"the {code} code adds (\d+)", prefix.rpartition("assistant: ")[2])
            values = [line.partition(". ")[2] for line in listed.split("\n") if line]
            right = str(int(number) + int(written[-1])) if written else ""
            best = values.index(right) if right in values else 0
            rows.append([0.0 if n == best else -5.0 for n in range(len(row))])
        return rows

    def tokenize(self, text: str) -> list[int]:
        """Characters."""
        return list(map(ord, text))

    def detokenize(self, ids: list[int]) -> str:
        """Characters."""
        return "".join(map(chr, ids))


def planted_task(seed: int, codes: int = 6, test: int = 24) -> TextTask:
    """One solved question for each code, and further ones; codes add numbers that only the solved questions show."""
    rng = random.Random(seed)
    names = rng.sample([f"code{n}x" for n in range(90)], codes)
    shifts = dict(zip(names, rng.sample(range(3, 60), codes), strict=True))

    def ask(code: str, number: int) -> Example:
        wrong = [str(number + s) for s in rng.sample([s for s in range(3, 60) if s != shifts[code]], 3)]
        return multiple_choice(f"In the {code} code, what does {number} become?", str(number + shifts[code]), wrong,
                               seed=rng.randrange(2**30))

    train = [ask(code, rng.randrange(100)) for code in shifts]
    return TextTask("codes", train, test=[ask(rng.choice(list(shifts)), rng.randrange(100, 200)) for _ in range(test)],
                    labels=LABELS)


def first_is_right(examples: Sequence[Example]) -> float:
    """How often the first candidate is the right one: what guessing gives."""
    return sum(e.target == "1" and CANDIDATES in e.inputs for e in examples) / len(examples)


__all__ = ["LABELS", "Kind", "PlantedModel", "first_is_right", "kinds", "planted_task", "question_task"]
