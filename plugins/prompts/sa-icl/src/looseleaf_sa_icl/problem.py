"""Problems: a question with or without candidates, how it is shown, and how an answer to it is read."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from looseleaf import Example
from looseleaf_text.slots import fill

CANDIDATES, EXPLANATION = "candidates", "explanation"
"""Inputs of an example: what can be chosen, in order; a worked explanation, shown where the example is a solved one."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One of the answers that can be chosen.

    Attributes:
        label: what is predicted: a class of the task, or the candidate itself.
        text: the candidate.
        reply: what the model says or is scored on.
        number: where it stands in the list of candidates, from 1; None: there is no list.
    """

    label: Any
    text: str
    reply: str
    number: int | None = None

    def __str__(self) -> str:
        return f"- {self.text}" if self.number is None else f"{self.number}. {self.text}"


def multiple_choice(question: str, answer: str, distractors: Sequence[str], *, seed: int = 0, **inputs: Any) -> Example:
    """A question with candidates in an order that the seed decides; the target is the number of the right one.

    The task's labels are numbers: ``{"1": "1", "2": "2", ...}``.

    Args:
        question: becomes the input ``text``.
        answer: the right candidate.
        distractors: the others.
        seed: of the order, together with the question.
        inputs: further inputs, such as ``explanation``.

    Raises:
        ValueError: repeated candidates.
    """
    candidates = [answer, *distractors]
    random.Random(f"{seed} {question}").shuffle(candidates)
    example = Example({"text": question, CANDIDATES: candidates, **inputs}, str(candidates.index(answer) + 1))
    options(example, {str(n + 1): str(n + 1) for n in range(len(candidates))})
    return example


def options(example: Example, labels: Mapping[str, str] | None) -> list[Option] | None:
    """What can be chosen for an example; None: its answer is free text.

    With the input ``candidates`` the first belongs to the first label, and so on; without labels each candidate is its
    own. Without candidates the labels themselves are to choose from.

    Raises:
        ValueError: candidates that are no list of two or more different texts, or more of them than labels.
    """
    candidates = example.inputs.get(CANDIDATES)
    if candidates is None:
        return None if labels is None else [Option(k, v.strip(), v) for k, v in labels.items()]
    if isinstance(candidates, str) or not isinstance(candidates, Sequence) or len(candidates) < 2:
        raise ValueError(f"candidates: expected a list of two texts or more, got {candidates!r}")
    texts = [str(c).strip() for c in candidates]
    if len({t.casefold() for t in texts}) < len(texts):
        raise ValueError(f"candidates: expected different ones, got {texts}")
    if labels is None:
        return [Option(text, text, str(n), n) for n, text in enumerate(texts, 1)]
    if len(texts) > len(labels):
        raise ValueError(f"candidates: expected at most {len(labels)}, one for each label {list(labels)}, got "
                         f"{len(texts)}")
    pairs = zip(texts, labels.items(), strict=False)
    return [Option(label, text, reply, n) for n, (text, (label, reply)) in enumerate(pairs, 1)]


def show(template: str, example: Example, choices: Sequence[Option] | None) -> str:
    """The question and its candidates, without the answer."""
    lines = [f"Question: {fill(template, example.inputs)}"]
    return "\n".join([*lines, *(["Candidates:", *map(str, choices)] if choices else [])])


def right_answer(example: Example, choices: Sequence[Option] | None) -> str:
    """The text of the right answer.

    Raises:
        ValueError: there is none, or it is not among the choices.
    """
    if example.target is None:
        raise ValueError("expected solved examples, got one without a target")
    if choices is None:
        return str(example.target)
    for option in choices:
        if str(option.label) == str(example.target):
            return option.text
    raise ValueError(f"expected a target among {[option.label for option in choices]}, got {example.target!r}")


def choice(reply: str, choices: Sequence[Option]) -> int | None:
    """Which of the choices a reply names, from 0; None: none of them, or several.

    Equality with the candidate's text comes first, as in the authors' code; then its number or label at the beginning;
    then a candidate that is mentioned, where it is the only one.
    """
    said = reply.strip().strip("\"'*().").casefold()
    for texts in ([o.text for o in choices], [o.reply.strip() for o in choices]):
        if said in [t.casefold() for t in texts]:
            return [t.casefold() for t in texts].index(said)
    begins = [n for n, o in enumerate(choices) if re.match(re.escape(o.reply.strip().casefold()) + r"(?!\w)", said)]
    if len(begins) == 1:
        return begins[0]
    mentioned = [n for n, o in enumerate(choices) if re.search(rf"(?<!\w){re.escape(o.text.casefold())}(?!\w)", said)]
    return mentioned[0] if len(mentioned) == 1 else None


__all__ = ["CANDIDATES", "EXPLANATION", "Option", "choice", "multiple_choice", "options", "right_answer", "show"]
