"""Instructions whose responses are judged by rules, without a stronger model, and a control for lucky answers.

A response follows an instruction where its content passes the check, it ends by itself and it writes no tag. A model
that says the same whatever it is asked passes checks too: hence every response is also held against the checks of
*other* instructions of its kind, and only what it passes more often of its own counts as following.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Sequence

from looseleaf.statistics import Interval, bootstrap, paired
from looseleaf_implicit_instruction_tuning.pairs import Response, Tags

KINDS = ("answer", "choice", "list")
ITEM_LINE = re.compile(r"^\s*(?:[-*\u2022]|\d+[.)])\s+(\S.*)$")


@dataclasses.dataclass(frozen=True)
class Item:
    """An instruction and what its response must be.

    Attributes:
        kind: ``"answer"``: the first line has one of ``accepted``; ``"choice"``: the first line has one of
            ``accepted`` and none of ``rejected``; ``"list"``: exactly ``count`` different items, one a line, marked or
            numbered.
        instruction: the text.
        accepted, rejected: words or phrases, of any case.
        count: items of a list.
    """

    kind: str
    instruction: str
    accepted: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    count: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Item.kind: expected {', '.join(map(repr, KINDS))}, got {self.kind!r}")
        if (self.kind == "list") != (self.count > 0) or (self.kind != "list") != bool(self.accepted):
            raise ValueError("Item: expected count >= 1 for a list, and accepted answers for the other kinds, got "
                             f"count={self.count}, accepted={self.accepted} for {self.kind!r}")

    def check(self, text: str) -> bool:
        """Whether the content of a response is right."""
        if self.kind == "list":
            lines = [match[1].strip().lower() for line in text.splitlines() if (match := ITEM_LINE.match(line))]
            return len(lines) == self.count == len(set(lines))
        first = next((line for line in text.splitlines() if line.strip()), "")
        return any(_has(first, a) for a in self.accepted) and not any(_has(first, r) for r in self.rejected)


def _has(text: str, phrase: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


@dataclasses.dataclass(frozen=True)
class Judged:
    """What the battery found of one model's responses; each list has an entry for each item.

    Attributes:
        content: the check of the item itself, 0 or 1.
        others: the fraction of the checks of other items of its kind that the response passes.
        ended: the response ended by itself.
        clean: no tag was written.
        repeated: fraction of the response's words in runs of four words that occur more than once.
        words: length of the response.
    """

    content: list[float]
    others: list[float]
    ended: list[float]
    clean: list[float]
    repeated: list[float]
    words: list[int]

    @property
    def passed(self) -> list[float]:
        """Right content, ended and clean, 0 or 1 for each item."""
        return [min(c, e, k) for c, e, k in zip(self.content, self.ended, self.clean, strict=True)]

    @property
    def score(self) -> Interval:
        """The fraction of items passed, with a 95 % bootstrap over items."""
        return bootstrap(self.passed)

    @property
    def form(self) -> Interval:
        """The fraction of responses that end by themselves and write no tag."""
        return bootstrap([min(e, k) for e, k in zip(self.ended, self.clean, strict=True)])

    @property
    def following(self) -> Interval:
        """Items whose check the response passes, less other items' checks that it passes, in responses of good form.

        On average 0 for a model that responds alike to everything, above 0 only where the response depends on the
        instruction.
        """
        form = [min(e, k) for e, k in zip(self.ended, self.clean, strict=True)]
        return paired([c * f for c, f in zip(self.content, form, strict=True)],
                      [o * f for o, f in zip(self.others, form, strict=True)])

    @property
    def follows(self) -> bool:
        """Whether the model follows instructions: the interval of :attr:`following` is above 0."""
        return self.following.low > 0


def judge(items: Sequence[Item], responses: Sequence[Response], tags: Tags | None = None) -> Judged:
    """Hold responses against the checks of their own items and of the others.

    Raises:
        ValueError: not equally many, or none.
    """
    if len(items) != len(responses) or not items:
        raise ValueError(f"judge: expected one response for each of one or more items, got {len(responses)} for "
                         f"{len(items)}")
    tags = tags or Tags()
    content, others = [], []
    for n, (item, response) in enumerate(zip(items, responses, strict=True)):
        content.append(float(item.check(response.text)))
        # All others of its kind, also those with the same answer: then one response to everything passes exactly as
        # many checks of its own as of others. An item that is alone has no control, and what it passes may be luck.
        rest = [other.check(response.text) for m, other in enumerate(items) if m != n and other.kind == item.kind]
        others.append(sum(rest) / len(rest) if rest else content[-1])
    return Judged(content, others, [float(r.ended) for r in responses],
                  [float(not any(tag.strip() in r.text for tag in (tags.user, tags.assistant))) for r in responses],
                  [_repeated(r.text) for r in responses], [len(r.text.split()) for r in responses])


def _repeated(text: str, n: int = 4) -> float:
    words = text.split()
    runs = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    counts = Counter(runs)
    return sum(count for count in counts.values() if count > 1) / len(runs) if runs else 0.0


def items(count: int = 0, seed: int = 0) -> list[Item]:
    """The built-in battery, its kinds in turn; ``count`` of them drawn by ``seed``, 0 for all."""
    if count < 0:
        raise ValueError(f"items: expected count >= 0, got {count}")
    kinds = [[Item("answer", text, accepted) for text, accepted in ANSWERS],
             [Item("choice", text, (right,), (wrong,)) for text, right, wrong in CHOICES],
             [Item("list", f"{verb} {_NUMBERS[n]} {what}.", count=n) for n, verb, what in LISTS]]
    if not count or count >= sum(map(len, kinds)):
        return [item for kind in kinds for item in kind]
    rng = random.Random(seed)
    for kind in kinds:
        rng.shuffle(kind)
    return [kinds[n % 3][n // 3] for n in range(3 * max(map(len, kinds))) if n // 3 < len(kinds[n % 3])][:count]


_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
ANSWERS: list[tuple[str, tuple[str, ...]]] = [
    ("What is the capital of France?", ("Paris",)), ("What is the capital of Japan?", ("Tokyo",)),
    ("What is the capital of Italy?", ("Rome",)), ("Name the capital of Germany.", ("Berlin",)),
    ("Which city is the capital of Spain?", ("Madrid",)), ("What is the capital of Russia?", ("Moscow",)),
    ("What language is spoken in Brazil?", ("Portuguese",)), ("What is the largest planet of our solar system?",
                                                               ("Jupiter",)),
    ("Which planet do we live on?", ("Earth",)),
    ("Which gas do plants take in from the air?", ("carbon dioxide", "CO2")),
    ("Who wrote Romeo and Juliet?", ("Shakespeare",)), ("Who painted the Mona Lisa?", ("Leonardo", "da Vinci")),
    ("How many days are in a week?", ("seven", "7")), ("How many legs does a spider have?", ("eight", "8")),
    ("How many months are in a year?", ("twelve", "12")), ("What color is a banana?", ("yellow",)),
    ("What is the chemical symbol of gold?", ("Au",)), ("What do bees make?", ("honey",)),
    ("Who was the first president of the United States?", ("Washington",)),
    ("What is frozen water called?", ("ice",)), ("On which continent is Egypt?", ("Africa",)),
    ("What is the currency of Japan?", ("yen",)), ("What is the largest ocean?", ("Pacific",)),
    ("Which organ pumps blood through the body?", ("heart",)),
]
"""Instruction and the answers that will do."""
CHOICES: list[tuple[str, str, str]] = [
    ("Is ice hot or cold?", "cold", "hot"), ("Is the sun hot or cold?", "hot", "cold"),
    ("Which is larger, an elephant or a mouse?", "elephant", "mouse"),
    ("Which is smaller, an ant or a horse?", "ant", "horse"),
    ("Is a whale a fish or a mammal?", "mammal", "fish"), ("Is a shark a fish or a mammal?", "fish", "mammal"),
    ("Is lemon juice sweet or sour?", "sour", "sweet"), ("Is sugar sweet or sour?", "sweet", "sour"),
    ("Is a feather light or heavy?", "light", "heavy"), ("Is lead light or heavy?", "heavy", "light"),
    ("Which comes first, Monday or Sunday, after Saturday?", "Sunday", "Monday"),
    ("Is the sky at night dark or bright?", "dark", "bright"), ("Is snow black or white?", "white", "black"),
    ("Is coal black or white?", "black", "white"), ("Is a turtle fast or slow?", "slow", "fast"),
    ("Is a cheetah fast or slow?", "fast", "slow"),
]
"""Instruction, the right and the wrong word."""
LISTS: list[tuple[int, str, str]] = [
    (3, "List", "fruits"), (4, "Name", "animals that live in the sea"), (5, "List", "colors"), (3, "Give", "tips for "
                                                                                              "better sleep"),
    (4, "List", "things to pack for a trip"), (5, "Name", "countries in Europe"), (2, "List", "reasons to exercise"),
    (3, "Name", "musical instruments"), (4, "List", "vegetables"), (5, "List", "kinds of sports"),
    (2, "Give", "ways to save water"), (3, "List", "items for a birthday party"), (4, "Name", "kitchen tools"),
    (5, "List", "jobs"), (2, "Name", "planets"), (3, "Give", "ideas for a gift"), (4, "List", "kinds of weather"),
    (5, "Name", "pieces of furniture"), (3, "List", "farm animals"), (2, "List", "things that are blue"),
]
"""How many, the verb and of what."""

__all__ = ["ANSWERS", "CHOICES", "KINDS", "LISTS", "Item", "Judged", "items", "judge"]
