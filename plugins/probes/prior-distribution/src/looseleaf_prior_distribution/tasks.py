"""Tasks with one right answer each whose answers differ in how likely they are beforehand, and some made from a seed:
counting, acronyms, shift cipher, reversal and looking up."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from looseleaf.errors import did_you_mean

T = TypeVar("T")

INSTRUCTION = ("The right answer may be an unlikely one. Do not rely on how common an answer is or on what you expect: "
           "work it out from the input alone.\n\n")
"""The prompting intervention: what stands before the prompt."""


@dataclasses.dataclass(frozen=True)
class Instance:
    """One question.

    Attributes:
        text: what goes into the template.
        answer: the right answer.
        size: how hard it is by itself, such as how many things are to be counted; the slope on the prior is also given
            at equal size.
    """

    text: str
    answer: str
    size: float = 0.0


@dataclasses.dataclass(frozen=True)
class PriorTask:
    """Questions of one kind, and the answers among which a model chooses by likelihood.

    A prompt is the demonstrations, each a line of template, answer and ``end``, and the template with the question.

    Attributes:
        name: short name.
        instances: the questions.
        answers: the answer space, two or more, all different.
        template: how a question is shown, with ``{input}``; the answer follows after a space.
        demonstrations: solved questions that come first.
        end: what closes an answer and is scored with it. Needed where an answer is the beginning of another one
            ("1" and "12"), which would otherwise count the other's probability as its own.
        instruction: what the prompting intervention puts in front.

    Raises:
        ValueError: no questions, fewer than two answers, an answer that occurs twice, a right answer that is not in
            the answer space, or a template without its slot.
    """

    name: str
    instances: tuple[Instance, ...]
    answers: tuple[str, ...]
    template: str = "{input} ->"
    demonstrations: tuple[Instance, ...] = ()
    end: str = ""
    instruction: str = INSTRUCTION

    def __post_init__(self) -> None:
        if self.template.count("{input}") != 1:
            raise ValueError(f"task {self.name!r}: expected a template with {{input}} once, got {self.template!r}")
        if not self.instances:
            raise ValueError(f"task {self.name!r}: expected one instance or more, got none")
        if len(self.answers) < 2 or not all(a.strip() for a in self.answers):
            raise ValueError(f"task {self.name!r}: expected two answers or more, none empty, got "
                             f"{list(self.answers)[:3]}")
        twice = [a for a, n in Counter(a.strip() for a in self.answers).items() if n > 1]
        if twice:
            raise ValueError(f"task {self.name!r}: expected each answer once, or the model cannot tell them apart, got "
                             f"{twice[0]!r} more than once (and {len(twice) - 1} more such answers)")
        known = set(self.answers)
        for instance in self.instances:
            if instance.answer not in known:
                raise ValueError(f"task {self.name!r}: expected right answers that are in the answer space of "
                                 f"{len(known)}, got {instance.answer!r}: add it."
                                 f"{did_you_mean(instance.answer, known)}")

    def prompt(self, instance: Instance, instructed: bool = False) -> str:
        """What the model is shown; ``instructed``: with the instruction in front."""
        return self._head(instructed) + self.template.replace("{input}", instance.text)

    def uninformative(self, instructed: bool = False) -> str:
        """The prompt with the question taken out: what it gives an answer is that answer's prior."""
        before, after = self.template.split("{input}")
        # the space that stood between the question and what follows goes with the question
        return self._head(instructed) + (before.rstrip(" ") + after if before else after.lstrip(" "))

    def continuation(self, answer: str) -> str:
        """An answer as it is scored."""
        return f" {answer}{self.end}"

    def line(self, instance: Instance) -> str:
        """A solved question, as it stands among the demonstrations."""
        text = self.template.replace("{input}", instance.text) + self.continuation(instance.answer)
        return text if text.endswith("\n") else text + "\n"

    def _head(self, instructed: bool) -> str:
        return (self.instruction if instructed else "") + "".join(self.line(d) for d in self.demonstrations)

    def part(self, instances: Sequence[Instance], answers: Sequence[str] | None = None) -> PriorTask:
        """The same task with other questions, and perhaps other answers."""
        return dataclasses.replace(self, instances=tuple(instances), answers=tuple(answers or self.answers))

    def to_json(self) -> str:
        """The task as text, such as a file for ``looseleaf run prior-distribution --text``."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> PriorTask:
        """The inverse of :meth:`to_json`; every field but name, instances and answers may be left out.

        Raises:
            ValueError: not such a text.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError("expected a task in JSON, as PriorTask.to_json writes it, got something else "
                             f"({error})") from error
        fields = {f.name for f in dataclasses.fields(cls)}
        unknown = [key for key in data if key not in fields] if isinstance(data, dict) else []
        if not isinstance(data, dict) or unknown or not {"name", "instances", "answers"} <= set(data):
            raise ValueError(f"expected a task with the fields {', '.join(sorted(fields))}, got "
                             f"{', '.join(data) or 'none' if isinstance(data, dict) else type(data).__name__}."
                             + (did_you_mean(unknown[0], fields) if unknown else ""))
        made = {**data, "answers": tuple(data["answers"]), "instances": _instances(data["instances"]),
                "demonstrations": _instances(data.get("demonstrations", ()))}
        return cls(**made)


def _instances(rows: Sequence[Mapping[str, Any]]) -> tuple[Instance, ...]:
    try:
        return tuple(Instance(**row) for row in rows)
    except TypeError as error:
        raise ValueError(f"expected instances with text, answer and, if you like, size ({error})") from error


def split_by_answer(task: PriorTask, priors: Mapping[str, float], *, held_out: float = 0.25, seed: int = 0,
                    ) -> tuple[PriorTask, PriorTask]:
    """Training and test part whose answers are disjoint and whose priors are spread alike.

    The answers, sorted by prior, are cut into runs of ``1 / held_out``, and from each run one is drawn for the test. An
    answer of the demonstrations may be on either side; it is not trained on there.

    Args:
        task: the task.
        priors: answer -> log prior.
        held_out: fraction of the answers that goes to the test set, in (0, 0.5].
        seed: of the draw.

    Raises:
        ValueError: a fraction out of range, an answer without a prior, or too few answers for two on each side.
    """
    if not 0 < held_out <= 0.5:
        raise ValueError(f"held_out: expected 0 < held_out <= 0.5, got {held_out}")
    missing = [a for a in task.answers if a not in priors]
    if missing:
        raise ValueError(f"priors: expected one for each answer, got none for {missing[0]!r} (and {len(missing) - 1} "
                         "more)")
    rng = random.Random(seed)
    ranked = sorted(task.answers, key=lambda a: (priors[a], a))
    count = round(len(ranked) * held_out)
    if count < 2 or len(ranked) - count < 2:
        raise ValueError(f"task {task.name!r} has {len(ranked)} answers: held_out={held_out} leaves fewer than two on "
                         "one side; give more answers")
    edges = [round(i * len(ranked) / count) for i in range(count + 1)]
    test = {rng.choice(ranked[a:b]) for a, b in itertools.pairwise(edges)}
    sides = []
    for chosen in ([a for a in task.answers if a not in test], [a for a in task.answers if a in test]):
        sides.append(task.part([i for i in task.instances if i.answer in set(chosen)], chosen))
    return sides[0], sides[1]


# ------------------------------------------------------------------------------------------- tasks made from a seed

_NUMBERS = """
    one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty
"""
_SHORT = """
    act add age ago aid aim air all and any are arm art ask bad bag bar bat bay bed bet bid big bit box boy bug
    bus but buy can cap car cat cow cry cup cut dad day did die dig dog dot dry due ear eat egg end era eye fan
    far fat few fig fit fly fog for fun gap gas get gun guy had has hat her hid him his hit hot how ice ill ink
    its jar job joy key kid lab law lay leg let lie lip lot low mad man map may men mix mom mud net new nor not
    now nut odd off oil old one our out own pad pan pay pen per pet pie pig pin pot put ran raw red rid row run
    sad sat saw say sea see set she sit six sky son sum sun tax tea ten the tie tin tip top toy try two use van
    war was way web wet who why win yes yet you zip zoo
"""
_LONG = """
    apple animal author autumn bottle banker bridge beauty castle camera circle cousin doctor desert dinner
    dragon engine editor effort empire farmer flower forest friend garden guitar ground ginger hammer hunter
    hockey harbour island insect injury impact jacket jungle junior journey kitchen kitten knight kidney letter
    lawyer ladder legend market mirror monkey museum nature number needle novel orange office object option
    planet pencil palace parent quarter queen quality question river rabbit record reward summer silver school
    spider table tunnel ticket temple uncle union unit umbrella valley violin victim village winter window
    worker weapon xenon xerox xylophone yellow yogurt youth yard zebra zipper zone zero
"""

NUMBERS = tuple(_NUMBERS.split())
"""One to twenty."""
WORDS = tuple(_SHORT.split())
"""Words of three letters, from very common to rare."""
FIRST = {letter: [word for word in _LONG.split() if word[0] == letter] for letter in string.ascii_lowercase}
"""Letter -> longer words that begin with it."""


def counting(instances: int = 48, *, seed: int = 0, most: int = 8, demonstrations: int = 8) -> PriorTask:
    """How many letters stand there: "k k k k" -> "four".

    The prior prefers small and round numbers.

    Args:
        instances: questions.
        seed: of the questions and demonstrations.
        most: largest number, 2 to 20; the answer space is all numbers up to it.
        demonstrations: solved questions in each prompt.
    """
    _check(instances, demonstrations)
    if not 2 <= most <= len(NUMBERS):
        raise ValueError(f"most: expected an integer in [2, {len(NUMBERS)}], got {most}")
    rng = random.Random(f"counting {seed}")

    def make(number: int) -> Instance:
        return Instance(" ".join(rng.choice(string.ascii_lowercase) * number), NUMBERS[number - 1], number)

    shown = [make(rng.randint(1, most)) for _ in range(demonstrations)]
    return PriorTask("counting", tuple(make(n) for n in _evenly(range(1, most + 1), instances, rng)), NUMBERS[:most],
                     demonstrations=tuple(shown))


def acronym(instances: int = 48, *, seed: int = 0, answers: int = 24, demonstrations: int = 8) -> PriorTask:
    """The first letters of three words: "table hammer engine" -> "t h e".

    Half of the answers are words, half are letters drawn at random: the prior prefers the words.

    Args:
        instances: questions.
        seed: of answers, questions and demonstrations.
        answers: size of the answer space, 4 or more; the demonstrations' answers are not in it.
        demonstrations: solved questions in each prompt.
    """
    return _letters("acronym", instances, seed, answers, demonstrations,
                    lambda word, rng: " ".join(rng.choice(FIRST[letter]) for letter in word))


def shift_cipher(instances: int = 48, *, seed: int = 0, answers: int = 24, demonstrations: int = 8, shift: int = 1,
                 ) -> PriorTask:
    """Letters moved back along the alphabet: "u i f" -> "t h e" for a shift of 1.

    Args:
        instances, seed, answers, demonstrations: as for :func:`acronym`.
        shift: by how much, in [1, 25].
    """
    if not 1 <= shift <= 25:
        raise ValueError(f"shift: expected an integer in [1, 25], got {shift}")
    alphabet = string.ascii_lowercase
    return _letters("shift cipher", instances, seed, answers, demonstrations, lambda word, rng: " ".join(
        alphabet[(alphabet.index(letter) + shift) % 26] for letter in word))


def reversal(instances: int = 48, *, seed: int = 0, answers: int = 24, demonstrations: int = 8) -> PriorTask:
    """Letters in reverse order: "e h t" -> "t h e"; copying, which a model does whatever the answer's prior.

    Args:
        instances, seed, answers, demonstrations: as for :func:`acronym`.
    """
    return _letters("reversal", instances, seed, answers, demonstrations,
                    lambda word, rng: " ".join(reversed(word)))


def middle_word(instances: int = 48, *, seed: int = 0, answers: int = 24, demonstrations: int = 8) -> PriorTask:
    """The second of three words: "tea the box" -> "the"; looking up, with little room for the answer's prior.

    Args:
        instances, seed, answers, demonstrations: as for :func:`acronym`.
    """
    _check(instances, demonstrations)
    if not 4 <= answers <= len(WORDS) - demonstrations:
        raise ValueError(f"answers: expected 4 to {len(WORDS) - demonstrations} beside {demonstrations} "
                         f"demonstrations, got {answers}")
    rng = random.Random(f"middle word {seed}")
    chosen = rng.sample(WORDS, answers + demonstrations)

    def make(word: str) -> Instance:
        first, last = rng.sample([w for w in WORDS if w != word], 2)
        return Instance(f"{first} {word} {last}", word)

    shown = tuple(make(word) for word in chosen[:demonstrations])
    space = chosen[demonstrations:]
    return PriorTask("middle word", tuple(make(word) for word in _evenly(space, instances, rng)), tuple(space),
                     demonstrations=shown)


TASKS: dict[str, Callable[..., PriorTask]] = {
    "counting": counting, "acronym": acronym, "shift_cipher": shift_cipher, "reversal": reversal,
    "middle_word": middle_word}
"""Name -> generator with the arguments ``instances``, ``seed`` and ``demonstrations``."""


def generate(name: str, instances: int, *, seed: int = 0, demonstrations: int = 8) -> PriorTask:
    """One of :data:`TASKS` by name.

    Raises:
        ValueError: no such task; near names are given.
    """
    if name not in TASKS:
        raise ValueError(f"task: expected {', '.join(TASKS)}, got {name!r}.{did_you_mean(name, TASKS)}")
    return TASKS[name](instances, seed=seed, demonstrations=demonstrations)


def _letters(name: str, instances: int, seed: int, answers: int, demonstrations: int,
             question: Callable[[str, random.Random], str]) -> PriorTask:
    _check(instances, demonstrations)
    if answers < 4:
        raise ValueError(f"answers: expected 4 or more, got {answers}")
    rng = random.Random(f"{name} {seed}")
    total = answers + demonstrations
    if (total + 1) // 2 > len(WORDS):
        raise ValueError(f"expected answers and demonstrations for {len(WORDS)} words or fewer, got {answers} answers "
                         f"and {demonstrations} demonstrations, which need {(total + 1) // 2}")
    chosen = rng.sample(WORDS, (total + 1) // 2)
    known = {*WORDS}
    while len(chosen) < total:
        made = "".join(rng.choices("abcdefghijklmnoprstuvwyz", k=3))
        if made not in known:
            known.add(made)
            chosen.append(made)
    rng.shuffle(chosen)
    shown = [Instance(question(word, rng), " ".join(word)) for word in chosen[:demonstrations]]
    space = chosen[demonstrations:]
    questions = [Instance(question(word, rng), " ".join(word)) for word in _evenly(space, instances, rng)]
    return PriorTask(name, tuple(questions), tuple(" ".join(word) for word in space), demonstrations=tuple(shown))


def _evenly(values: Sequence[T], count: int, rng: random.Random) -> list[T]:
    """``count`` of ``values``, each as often as the others but for one, in random order."""
    out: list[T] = []
    while len(out) < count:
        out += rng.sample(list(values), min(len(values), count - len(out)))
    rng.shuffle(out)
    return out


def _check(instances: int, demonstrations: int) -> None:
    if instances < 1 or demonstrations < 0:
        raise ValueError(f"expected instances >= 1 and demonstrations >= 0, got instances={instances}, "
                         f"demonstrations={demonstrations}")
