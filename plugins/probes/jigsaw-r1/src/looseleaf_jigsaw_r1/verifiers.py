"""Rewards by rule: reading answers, scoring them, and what GRPO makes of a group of rewards."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FORMAT_WEIGHT = 0.5
"""Weight of the format's reward beside that of accuracy."""
_WHOLE = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def answer_of(text: str, thinking: bool) -> str:
    """The answer in an output: what is between the answer tags, or all of it where there are none. [choice]"""
    found = _ANSWER.search(text) if thinking else None
    return (found.group(1) if found else text).strip()


def parse_arrangement(answer: str, patches: int) -> list[int] | None:
    """The numbers of an arrangement; None where a token is no integer in 1..patches.

    Backticks, commas, semicolons and line ends are spaces. Numbers may be repeated, and there may be any count of them.
    """
    tokens = re.sub(r"[`,;\n]", " ", answer).split()
    if not tokens or not all(token.isascii() and token.isdigit() and 1 <= int(token) <= patches for token in tokens):
        return None
    return [int(token) for token in tokens]


def parse_letter(answer: str) -> str | None:
    """The *last* capital letter: "B. I think so" reads I, as in the authors' code."""
    capitals = re.findall(r"[A-Z]", answer)
    return capitals[-1] if capitals else None


def parse_box(answer: str) -> tuple[float, ...] | None:
    """Four numbers, left, top, right and bottom; None where there are not exactly four."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", answer)
    return tuple(map(float, numbers)) if len(numbers) == 4 else None


def iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom); 0 where one has no area."""
    def area(box: Sequence[float]) -> float:
        return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])

    shared = area([max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])])
    union = area(one) + area(other) - shared
    return shared / union if union > 0 and area(one) > 0 and area(other) > 0 else 0.0


def accuracy(text: str, solution: str, question: str, thinking: bool, patches: int) -> float:
    """The accuracy reward of one output, in [0, 1].

    Args:
        text: the whole output.
        solution: the right answer.
        question: see :data:`looseleaf_jigsaw_r1.puzzles.QUESTIONS`; ``full`` gives the fraction of right indices,
            ``box`` the intersection over union, the others 0 or 1.
        thinking: whether the answer stands in tags.
        patches: m n.
    """
    answer = answer_of(text, thinking)
    if question in ("full", "single"):
        given, right = parse_arrangement(answer, patches), list(map(int, solution.split()))
        if given is None or len(given) != len(right):
            return 0.0
        return sum(a == b for a, b in zip(given, right, strict=True)) / len(right)
    if question == "box":
        box = parse_box(answer)
        return 0.0 if box is None else iou(box, tuple(map(float, solution.split())))
    return float(parse_letter(answer) == solution)


def is_right(reward: float, question: str) -> bool:
    """Whether an accuracy reward counts as right: above 0.5 for boxes, 1 for the others."""
    return reward > 0.5 if question == "box" else reward == 1.0


def well_formed(text: str, question: str, thinking: bool, patches: int) -> bool:
    """Whether an output has the form that was asked for.

    With thinking the whole output is reasoning, optional space and answer, each tag once. Without: exactly one capital
    for letters, the right count of indices, or four numbers. [the last two are ours]
    """
    if thinking:
        return _WHOLE.fullmatch(text.strip()) is not None and all(text.count(tag) == 1 for tag in _TAGS)
    if question in ("full", "single"):
        given = parse_arrangement(text, patches)
        return given is not None and len(given) == (patches if question == "full" else 1)
    if question == "box":
        return parse_box(text) is not None
    return len(re.findall(r"[A-Z]", text)) == 1


def text_of(completion: Any) -> str:
    """The text of a completion of trl: a text, or messages whose content is a text or parts."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def accuracy_reward(completions: Sequence[Any], solution: Sequence[str], question: Sequence[str],
                    thinking: Sequence[bool], patches: Sequence[int], **_: Any) -> list[float]:
    """The accuracy reward in trl's signature; see :func:`accuracy`."""
    rows = zip(completions, solution, question, thinking, patches, strict=True)
    return [accuracy(text_of(c), s, q, t, p) for c, s, q, t, p in rows]


def binary_reward(completions: Sequence[Any], solution: Sequence[str], question: Sequence[str],
                  thinking: Sequence[bool], patches: Sequence[int], **_: Any) -> list[float]:
    """1 where the whole answer is right, else 0: what the paper compares the fractional reward with."""
    rewards = accuracy_reward(completions, solution, question, thinking, patches)
    return [float(is_right(r, q)) for r, q in zip(rewards, question, strict=True)]


def format_reward(completions: Sequence[Any], question: Sequence[str], thinking: Sequence[bool],
                  patches: Sequence[int], **_: Any) -> list[float]:
    """The format reward, 1 or 0, in trl's signature; see :func:`well_formed`."""
    rows = zip(completions, question, thinking, patches, strict=True)
    return [float(well_formed(text_of(c), q, t, p)) for c, q, t, p in rows]


def advantages(rewards: Tensor) -> Tensor:
    """Advantages of groups: (r - mean) / (sample standard deviation + 1e-4) over the last dimension."""
    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-4)


def grpo_loss(log_p: Tensor, old: Tensor, reference: Tensor, advantage: Tensor, mask: Tensor, *, epsilon: float = 0.2,
              beta: float = 0.04) -> Tensor:
    """The loss of GRPO, written plainly; trl's is used for training.

    Args:
        log_p, old, reference: log-probabilities (B, T) of the tokens under the policy, the policy that drew them and
            the reference.
        advantage: (B,).
        mask: (B, T), 1 for tokens of the completion.
        epsilon: of the clipped ratio.
        beta: weight of the divergence from the reference, by the k3 estimate.

    Returns:
        A scalar: mean over the tokens of a sequence, then over sequences.
    """
    ratio = (log_p - old).exp()
    a = advantage[:, None]
    gain = torch.minimum(ratio * a, ratio.clamp(1 - epsilon, 1 + epsilon) * a)
    k3 = (reference - log_p).exp() - (reference - log_p) - 1
    per_token = -(gain - beta * k3) * mask
    return (per_token.sum(1) / mask.sum(1).clamp(min=1)).mean()


@dataclasses.dataclass(frozen=True)
class Words:
    """What the paper counts in reasoning: outputs with a keyword in 1,000, and the mean length in words.

    ``recheck`` is any of recheck, reverify, reevaluate and reexamine; ``backwards`` is working backwards.
    """

    recheck: float
    backwards: float
    length: float


def keywords(outputs: Sequence[str]) -> Words:
    """Keyword rates per 1,000 outputs; hyphens do not matter (``re-check``)."""
    count = max(1, len(outputs))
    plain = [text.lower().replace("-", "") for text in outputs]

    def rate(pattern: str) -> float:
        return 1000 * sum(re.search(pattern, text) is not None for text in plain) / count

    return Words(rate(r"\bre(check|verif|evaluat|examin)"), rate(r"\bwork(s|ed|ing)? backwards?"),
                 sum(len(text.split()) for text in plain) / count)


__all__ = ["FORMAT_WEIGHT", "Words", "accuracy", "accuracy_reward", "advantages", "answer_of", "binary_reward",
           "format_reward", "grpo_loss", "iou", "is_right", "keywords", "parse_arrangement", "parse_box",
           "parse_letter", "text_of", "well_formed"]
