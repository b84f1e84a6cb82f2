"""Two models whose scores are known: one that only remembers, and one that only reasons.

A probe that does not give the first Gamma 1 and Delta 1, and the second Gamma 1 and Delta 0, is wrong.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence

from looseleaf_abstract_reasoning.datasets import STORY_RULES, numbers_in
from looseleaf_abstract_reasoning.items import ANSWER, Item, Problem, draw_remapping, render
from looseleaf_abstract_reasoning.rules import LIBRARY, Rule, explaining
from looseleaf_text import LanguageModel

_PAIR = re.compile(rf"Question: (.*)\n{ANSWER}(?: (.*)\.)?")
_OPERANDS = re.compile(r"\[[^\]]*\]|\{[^}]*\}|\S+")


class Control(LanguageModel):
    """A language model that either knows the answer to a prompt for certain or nothing at all."""

    @abstractmethod
    def answer(self, prompt: str) -> str | None:
        """The answer, or None."""

    def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
        """Near certainty for its answer; without one, all continuations are equally likely."""
        self.calls += len(prefixes)
        out = []
        for prefix, row in zip(prefixes, continuations, strict=True):
            answer = self.answer(prefix)
            out.append([-1.0 if answer is not None and text == f" {answer}." else -20.0 for text in row])
        return out

    def generate(self, prompts: list[str], max_tokens: int, stop: list[str] | None = None,
                 temperature: float = 0.0, seed: int = 0) -> list[str]:
        """Its answer, or nothing."""
        self.calls += len(prompts)
        answers = [self.answer(prompt) for prompt in prompts]
        return ["" if answer is None else f" {answer}." for answer in answers]

    def tokenize(self, text: str) -> list[int]:
        """One token a character."""
        return [ord(character) for character in text]

    def detokenize(self, ids: list[int]) -> str:
        """The characters of ``ids``."""
        return "".join(map(chr, ids))


class Memoriser(Control):
    """Looks prompts up among those it has seen: the ``items`` with original symbols.

    Args:
        items: what it remembers; remapped ones are left out.
    """

    name = "memoriser"

    def __init__(self, items: Iterable[Item]) -> None:
        self._answers = {item.prompt: item.answer for item in items if item.kind == "original"}

    def answer(self, prompt: str) -> str | None:
        """What stands beside the prompt in its memory."""
        return self._answers.get(prompt)


class Oracle(Control):
    """Finds the rule by program induction, whatever the symbols.

    It reads the prompt alone, with a key that says which letter stands for which operand symbol. Operators it does not
    read: it takes the first of ``rules`` that explains all demonstrations, and applies it to the question.

    Args:
        keys: prompt -> letter -> operand symbol.
        rules: all that it can think of; None: every rule of this package.
    """

    name = "oracle"

    def __init__(self, keys: Mapping[str, Mapping[str, str]], rules: Sequence[Rule] | None = None) -> None:
        self._keys = keys
        self._rules = [*LIBRARY, *STORY_RULES] if rules is None else list(rules)

    @classmethod
    def of(cls, problems: Iterable[Problem], kinds: Iterable[str], seed: int = 0) -> Oracle:
        """The oracle of ``problems`` as :func:`render` renders them with this ``seed``."""
        keys = {}
        for problem in problems:
            for kind in kinds:
                if kind == "original" or kind in problem.remappings:
                    key = draw_remapping(problem, kind, seed).inverse()
                    keys[render(problem, kind, seed).prompt] = key
        return cls(keys)

    def answer(self, prompt: str) -> str | None:
        """The answer by the first rule that explains the demonstrations; None without such a rule."""
        key = self._keys.get(prompt, {})
        letters = {symbol: letter for letter, symbol in key.items()}
        read = [("".join(key.get(c, c) for c in question), "".join(key.get(c, c) for c in answer))
                for question, answer in _PAIR.findall(prompt)]
        pairs = [(_operands(question), answer) for question, answer in read]
        stories = read[-1][0].endswith("?")
        rules = [rule for rule in self._rules if stories == (not rule.operator)]
        for rule in explaining(rules, pairs[:-1])[:1]:
            answer = rule.apply(*pairs[-1][0])
            return "".join(letters.get(c, c) for c in answer)
        return None


def _operands(question: str) -> tuple[str, ...]:
    """The operands of a question in original symbols."""
    if question.endswith("?"):
        return numbers_in(question)
    parts = _OPERANDS.findall(question)[:-1]  # the last is the sign of equality
    return (parts[0], parts[2]) if len(parts) == 3 else (parts[-1],)
