"""Tasks made from a seed: counting, acronyms, shift cipher, reversal and looking up."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from typing import TypeVar

from looseleaf.errors import did_you_mean
from looseleaf_prior_distribution.tasks import Instance, PriorTask
from looseleaf_prior_distribution.words import FIRST, NUMBERS, WORDS

T = TypeVar("T")


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
        raise ValueError(f"most={most}: allowed is 2 to {len(NUMBERS)}")
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
        shift: by how much, 1 to 25.
    """
    if not 1 <= shift <= 25:
        raise ValueError(f"shift={shift}: allowed is 1 to 25")
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
        raise ValueError(f"answers={answers}: allowed is 4 to {len(WORDS) - demonstrations} beside {demonstrations} "
                         "demonstrations")
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
        raise ValueError(f"task {name!r}: allowed are {', '.join(TASKS)}.{did_you_mean(name, TASKS)}")
    return TASKS[name](instances, seed=seed, demonstrations=demonstrations)


def _letters(name: str, instances: int, seed: int, answers: int, demonstrations: int,
             question: Callable[[str, random.Random], str]) -> PriorTask:
    _check(instances, demonstrations)
    if answers < 4:
        raise ValueError(f"answers={answers}: allowed is 4 or more")
    rng = random.Random(f"{name} {seed}")
    total = answers + demonstrations
    if (total + 1) // 2 > len(WORDS):
        raise ValueError(f"{answers} answers and {demonstrations} demonstrations need {(total + 1) // 2} words: there "
                         f"are {len(WORDS)}, ask for fewer")
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
        raise ValueError(f"instances={instances}, demonstrations={demonstrations}: allowed is 1 or more, and 0 or more")


__all__ = ["TASKS", "acronym", "counting", "generate", "middle_word", "reversal", "shift_cipher"]
