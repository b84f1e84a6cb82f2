"""Gamma and Delta: accuracy with original symbols, and how much of it is lost when they are remapped (section 4)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from looseleaf import Report, Series
from looseleaf import progress as progress_
from looseleaf.statistics import Interval, bootstrap
from looseleaf_abstract_reasoning.datasets import CATEGORIES
from looseleaf_abstract_reasoning.items import KINDS, REMAPPINGS, Item
from looseleaf_text import LanguageModel

BATCH = 64
"""Items given to the model at once."""
Points = list[tuple[float, Interval]]
"""Numbers of categories, each with a figure and its interval."""


@dataclass(frozen=True)
class Score:
    """How a model did on an item.

    Attributes:
        item: the item.
        correct: 1.0 or 0.0.
        answer: the choice that the model found likeliest, or the answer read from its text.
        chance: the fraction of the choices that is right; 0 for generated answers.
    """

    item: Item
    correct: float
    answer: str
    chance: float


# ------------------------------------------------------------------------------------------------ one item at a time

def score_by_likelihood(model: LanguageModel, items: Sequence[Item], progress: bool | None = None) -> list[Score]:
    """Correct where the right answer is likelier than every other choice, summed over its tokens.

    A tie of the two likeliest choices is no answer, so that a model that cannot tell is not helped by their order.

    Args:
        model: what is measured.
        items: in any order; scores have the same.
        progress: show a progress bar; None: only on a terminal.
    """
    out: list[Score] = []
    for batch in _batches(items, "scoring", progress):
        rows = model.score([item.prompt for item in batch], [item.continuations for item in batch])
        for item, row in zip(batch, rows, strict=True):
            others = [value for k, value in enumerate(row) if k != item.gold]
            answer = item.choices[max(range(len(row)), key=row.__getitem__)]
            out.append(Score(item, float(row[item.gold] > max(others)), answer, 1 / len(row)))
    return out


def score_by_match(model: LanguageModel, items: Sequence[Item], progress: bool | None = None) -> list[Score]:
    """Correct where the answer read from the generated text equals the right one.

    Args:
        model, items, progress: as for :func:`score_by_likelihood`; one item or more.
    """
    # A token is at least a character; the rest is for a model that repeats "Answer: The answer is" first.
    longest = max(len(item.answer) for item in items) + 16
    out: list[Score] = []
    for batch in _batches(items, "answering", progress):
        texts = model.generate([item.prompt for item in batch], longest, stop=["\n\n"])
        for item, answer in zip(batch, map(extract, texts), strict=True):
            out.append(Score(item, float(answer == item.answer), answer, 0.0))
    return out


def extract(text: str) -> str:
    """The answer in a generated text: what follows the last ``answer is``, or the first line, to its full stop."""
    after = re.split(r"answer is:?", text, flags=re.IGNORECASE)[-1]
    line = next((part for part in after.splitlines() if part.strip()), "")
    bare = re.split(r"\.(?:\s|$)", line.strip(" \t*`\"'"))[0]
    return bare.strip(" \t*`\"'")


def _batches(items: Sequence[Item], label: str, progress: bool | None) -> Iterator[Sequence[Item]]:
    with progress_.bar(label, len(items), progress) as progress_bar:
        for start in range(0, len(items), BATCH):
            batch = items[start:start + BATCH]
            yield batch
            progress_bar.update(len(batch))


# ------------------------------------------------------------------------------------------------------- all of them

def gamma(scores: Sequence[Score]) -> Interval:
    """The abstract reasoning score: accuracy, with its 95 % bootstrap interval over items."""
    return bootstrap(score.correct for score in scores)


def pairs(scores: Sequence[Score], kind: str, category: str | None = None) -> np.ndarray:
    """Correct in original symbols, and correct when remapped: (problems, 2), float64.

    Args:
        scores: of originals and remapped items, in any order.
        kind: of remapping.
        category: only problems whose original is of this category; None: all.

    Returns:
        One row for each problem with both.
    """
    originals = {score.item.problem: score for score in scores if score.item.kind == "original"}
    rows = [(originals[score.item.problem].correct, score.correct) for score in scores
            if score.item.kind == kind and score.item.problem in originals
            and category in (None, originals[score.item.problem].item.category)]
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def delta(rows: np.ndarray) -> Interval:
    """The memory dependence score of :func:`pairs`: Gamma(original) less Gamma(remapped)."""
    return _over_problems(rows, lambda means: means[:, 0] - means[:, 1])


def relative_delta(rows: np.ndarray) -> Interval:
    """Delta as a fraction of Gamma(original); NaN where that is 0.

    Resamples in which it is 0 are left out of the interval.
    """
    if not rows[:, 0].any():
        return Interval(math.nan, math.nan, math.nan)

    def fraction(means: np.ndarray) -> np.ndarray:
        means = means[means[:, 0] > 0]
        lost: np.ndarray = 1 - means[:, 1] / means[:, 0]
        return lost

    return _over_problems(rows, fraction)


def _over_problems(rows: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> Interval:
    """Bootstrap of a statistic of means (samples, 2); a problem's two values stay together."""
    return bootstrap(range(len(rows)), statistic=lambda drawn: statistic(rows[drawn.astype(np.int64)].mean(1)))


# -------------------------------------------------------------------------------------------------------- the report

def of_category(scores: Sequence[Score], category: str) -> list[Score]:
    """The scores that make up Gamma of a category: original symbols, but in symbolic reasoning the remapped ones."""
    return [score for score in scores if score.item.category == category
            and (score.item.kind == "original") != (category == "symbolic-reasoning")]


def write_report(report: Report, scores: Sequence[Score]) -> None:
    """Add Gamma, Delta, sub-datasets, figures and a few items to a report."""
    # the paper's categories in its order, then others
    names = [name for name in dict.fromkeys([*CATEGORIES, *(score.item.category for score in scores)])
             if of_category(scores, name)]
    _gamma(report, scores, names)
    _delta(report, scores, names)
    _datasets(report, scores)
    for kind in KINDS:
        score = next((score for score in scores if score.item.kind == kind), None)
        if score is not None:
            report.examples.append((f"{score.item.problem}, {kind}: right {score.item.answer}, the model "
                                    f"{score.answer}", score.item.prompt))


def _gamma(report: Report, scores: Sequence[Score], names: Sequence[str]) -> None:
    table = report.table("Gamma, the abstract reasoning score", [
        "category", "description", "items", "chance", "Gamma", "low", "high"],
        note="accuracy, and 95 % bootstrap interval over items; symbolic reasoning: all three remappings together")
    for name in names:
        part = of_category(scores, name)
        table.add(name, CATEGORIES.get(name, ""), len(part), float(np.mean([score.chance for score in part])),
                  *gamma(part))


def _delta(report: Report, scores: Sequence[Score], names: Sequence[str]) -> None:
    table = report.table("Delta, the memory dependence score", [
        "category", "remapped", "problems", "Gamma", "after", "Delta", "low", "high", "of Gamma", "low", "high"],
        note="Gamma of the same problems before and after, absolute and as a fraction of Gamma; 95 % bootstrap over "
             "problems. The paper has it for extended calculation alone. Guesses survive a remapping, so with choices "
             "Delta is at most Gamma minus chance, apart from luck")
    accuracy: dict[str, Points] = {kind: [] for kind in KINDS}
    loss: dict[str, Points] = {kind: [] for kind in REMAPPINGS}
    places = [name for name in names if name != "symbolic-reasoning"]
    for at, name in enumerate(places, 1):
        accuracy["original"].append((at, gamma(of_category(scores, name))))
        for kind in REMAPPINGS:
            rows = pairs(scores, kind, name)
            if not len(rows):
                continue
            lost = delta(rows)
            before, after = rows.mean(0)
            table.add(name, kind, len(rows), float(before), float(after), *lost,
                      *(None if math.isnan(value) else value for value in relative_delta(rows)))
            accuracy[kind].append((at, bootstrap(rows[:, 1])))
            loss[kind].append((at, lost))
    legend = ", ".join(f"{at} {name}" for at, name in enumerate(places, 1))
    report.figure("Gamma in original and in remapped symbols", x_label="category", y_label="accuracy", note=legend,
                  series=_series(accuracy))
    report.figure("Delta by what was remapped", x_label="category", y_label="loss of accuracy", note=legend,
                  series=_series(loss))


def _series(points: Mapping[str, Points]) -> list[Series]:
    """Points with their intervals, side by side where they belong to one category."""
    return [Series(kind, [at + 0.12 * k for at, _ in some], [interval.value for _, interval in some],
                   [interval.low for _, interval in some], [interval.high for _, interval in some], style="points")
            for k, (kind, some) in enumerate(points.items()) if some]


def _datasets(report: Report, scores: Sequence[Score]) -> None:
    """Accuracy of each sub-dataset in each kind of symbols."""
    table = report.table("Sub-datasets", ["number", "sub-dataset", "category", "problems", *KINDS])
    image = []
    for number, name in enumerate(dict.fromkeys(score.item.dataset for score in scores)):
        part = [score for score in scores if score.item.dataset == name]
        by_kind = [[score.correct for score in part if score.item.kind == kind] for kind in KINDS]
        accuracy = [float(np.mean(values)) if values else None for values in by_kind]
        table.add(number, name, part[0].item.category, len({score.item.problem for score in part}), *accuracy)
        image.append([math.nan if value is None else value for value in accuracy])
    report.figure("Accuracy of each sub-dataset", x_label="0 original, 1 operators, 2 operands, 3 both",
                  y_label="number of the sub-dataset", image=image)
