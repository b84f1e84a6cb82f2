"""Whether reasoning and answer agree, by a judge."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from looseleaf.statistics import Interval
from looseleaf_jigsaw_r1.probe import wilson
from looseleaf_jigsaw_r1.puzzles import Puzzle
from looseleaf_jigsaw_r1.verifiers import accuracy, is_right, well_formed
from looseleaf_text import ChatModel

Judge = Callable[[str, str, str], bool]
"""(question, reasoning, answer) -> whether the reasoning leads to the answer."""
PROMPT = ("Question: {question}\n\nReasoning: {reasoning}\n\nAnswer: {answer}\n\nDoes the reasoning lead to this "
          "answer, be it right or wrong? Say yes or no.")
_PARTS = re.compile(r"<think>(.*?)</think>\s*<answer>(.*?)</answer>", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Consistency:
    """How often reasoning leads to the answer that is given.

    Attributes:
        right: of the outputs whose answer is right, the judge's verdicts.
        wrong: of those whose answer is wrong.
        left_out: outputs without the form of reasoning and answer, or on which the judge said neither yes nor no.
    """

    right: list[bool]
    wrong: list[bool]
    left_out: int

    @property
    def value(self) -> Interval:
        """The fraction that is consistent, with its 95 % Wilson interval.

        Raises:
            ValueError: every output was left out.
        """
        verdicts = self.right + self.wrong
        if not verdicts:
            raise ValueError(f"consistency: expected outputs of the form <think> </think> <answer> </answer> on which "
                             f"the judge says yes or no, got none among {self.left_out}")
        return wilson(sum(verdicts), len(verdicts))


def consistency(asked: Sequence[Puzzle], outputs: Sequence[str], judge: Judge | ChatModel) -> Consistency:
    """Ask a judge of each output whether its reasoning leads to its answer. [the words are ours]

    Args:
        asked: puzzles with ``thinking``.
        outputs: one for each.
        judge: a function (:data:`Judge`), or a :class:`looseleaf_text.ChatModel` such as a ``ChatEndpoint``, which is
            asked for yes or no.

    Raises:
        TypeError: another judge.
        ValueError: not as many outputs as puzzles, or puzzles without reasoning.
    """
    if not isinstance(judge, ChatModel) and not callable(judge):
        raise TypeError(f"judge: expected a function or a ChatModel, got {type(judge).__name__}")
    if len(asked) != len(outputs) or not all(p.thinking for p in asked):
        raise ValueError(f"consistency: expected one output for each puzzle, all with thinking=True, got {len(asked)} "
                         f"puzzles, {len(outputs)} outputs and {sum(not p.thinking for p in asked)} without thinking")
    formed = [n for n, (p, text) in enumerate(zip(asked, outputs, strict=True))
              if well_formed(text, p.question, True, p.m * p.n)]
    parts: list[tuple[str, str, str]] = []
    for n in formed:
        found = _PARTS.search(outputs[n])
        assert found is not None
        parts.append((asked[n].text, found.group(1).strip(), found.group(2).strip()))
    verdicts: list[bool | None]
    if isinstance(judge, ChatModel):
        questions: list[Any] = [[{"role": "user", "content": PROMPT.format(question=q, reasoning=r, answer=a)}]
                                for q, r, a in parts]
        verdicts = [_yes(said) for said in judge.chat(questions, 8)] if questions else []
    else:
        verdicts = [bool(judge(*each)) for each in parts]
    right, wrong = list[bool](), list[bool]()
    for n, verdict in zip(formed, verdicts, strict=True):
        puzzle = asked[n]
        reward = accuracy(outputs[n], puzzle.solution, puzzle.question, True, puzzle.m * puzzle.n)
        if verdict is not None:
            (right if is_right(reward, puzzle.question) else wrong).append(verdict)
    return Consistency(right, wrong, len(asked) - len(right) - len(wrong))


def _yes(said: str) -> bool | None:
    found = re.search(r"\b(yes|no)\b", said.lower())
    return found.group(1) == "yes" if found else None


__all__ = ["PROMPT", "Consistency", "Judge", "consistency"]
