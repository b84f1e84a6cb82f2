"""Gamma and Delta: accuracy with original symbols, and what of it is lost when they are remapped (section 4)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from looseleaf_text import LanguageModel
from looseleaf import progress as progress_
from looseleaf_abstract_reasoning.items import Item

BATCH = 64
RESAMPLES = 2000
Interval = tuple[float, float, float]
"""Estimate, and lower and upper end of its 95 % bootstrap interval."""


@dataclass(frozen=True)
class Mark:
    """What a model made of an item.

    Attributes:
        item: the item.
        right: 1.0 or 0.0.
        said: the choice it found likeliest, or the answer read from its text.
        chance: the share of its choices that is right; 0 for generated answers.
    """

    item: Item
    right: float
    said: str
    chance: float


# -- one item at a time -----------------------------------------------------------------------------------------------

def mark_by_likelihood(model: LanguageModel, items: Sequence[Item], progress: bool | None = None) -> list[Mark]:
    """Right where the right answer is likelier than every other choice, summed over its tokens.

    Two likeliest choices alike are no answer, so that a model that cannot tell is not helped by their order.
    """
    out: list[Mark] = []
    for part in _parts(items, "scoring", progress):
        rows = model.score([item.prompt for item in part], [item.continuations for item in part])
        for item, row in zip(part, rows, strict=True):
            others = [value for k, value in enumerate(row) if k != item.gold]
            said = item.choices[max(range(len(row)), key=row.__getitem__)]
            out.append(Mark(item, float(row[item.gold] > max(others)), said, 1 / len(row)))
    return out


def mark_by_match(model: LanguageModel, items: Sequence[Item], progress: bool | None = None) -> list[Mark]:
    """Right where the answer read from the generated text equals the right one."""
    # A token is at least a character; the rest is for a model that repeats "Answer: The answer is" first.
    longest = max(len(item.answer) for item in items) + 16
    out: list[Mark] = []
    for part in _parts(items, "answering", progress):
        for item, text in zip(part, model.generate([item.prompt for item in part], longest, stop=["\n\n"]),
                              strict=True):
            said = extract(text)
            out.append(Mark(item, float(said == item.answer), said, 0.0))
    return out


def extract(text: str) -> str:
    """The answer in a generated text: what follows the last ``answer is``, or the first line, to its full stop."""
    after = re.split(r"answer is:?", text, flags=re.IGNORECASE)[-1]
    line = next((part for part in after.splitlines() if part.strip()), "")
    bare = re.split(r"\.(?:\s|$)", line.strip(" \t*`\"'"))[0]
    return bare.strip(" \t*`\"'")


def _parts(items: Sequence[Item], label: str, progress: bool | None) -> Iterator[Sequence[Item]]:
    """The items a batch at a time, under a progress bar."""
    with progress_.bar(label, len(items), progress) as moving:
        for start in range(0, len(items), BATCH):
            part = items[start:start + BATCH]
            yield part
            moving.update(len(part))


# -- all of them ------------------------------------------------------------------------------------------------------

def bootstrap(rows: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> Interval:
    """Percentile bootstrap over problems; a problem's values stay together.

    Args:
        rows: (problems, values), float64.
        statistic: of means (samples, values) to (samples,).
        seed: of the resampling.

    Returns:
        The statistic of all problems and its 95 % interval; NaN where there is no finite one.
    """
    drawn = np.random.default_rng(seed).integers(0, len(rows), (RESAMPLES, len(rows)))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = statistic(rows[drawn].mean(1))
        value = float(statistic(rows.mean(0)[None])[0])
    finite = found[np.isfinite(found)]
    if not np.isfinite(value) or not finite.size:
        return float("nan"), float("nan"), float("nan")
    low, high = np.quantile(finite, [0.025, 0.975])
    return value, float(low), float(high)


def gamma(marks: Sequence[Mark]) -> Interval:
    """The abstract reasoning score of these marks: their mean."""
    return bootstrap(np.array([[mark.right] for mark in marks]), lambda means: means[:, 0])


def pairs(marks: Sequence[Mark], kind: str, category: str | None = None) -> np.ndarray:
    """(problems, 2): right in original symbols, right when remapped by ``kind``; one row for each problem with both.

    Args:
        marks: of originals and remapped items, in any order.
        kind: of remapping.
        category: only problems whose original is of this category; None: all.
    """
    before = {mark.item.problem: mark for mark in marks if mark.item.kind == "original"}
    rows = [(before[mark.item.problem].right, mark.right) for mark in marks
            if mark.item.kind == kind and mark.item.problem in before
            and category in (None, before[mark.item.problem].item.category)]
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def delta(rows: np.ndarray) -> Interval:
    """The memory dependence score of :func:`pairs`: Gamma(original) less Gamma(remapped)."""
    return bootstrap(rows, lambda means: means[:, 0] - means[:, 1])


def relative_delta(rows: np.ndarray) -> Interval:
    """Delta as a share of Gamma(original); NaN where that is 0."""
    return bootstrap(rows, lambda means: 1 - means[:, 1] / means[:, 0])
