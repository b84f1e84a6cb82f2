"""Tables and figures of marks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from looseleaf import Report, Series
from looseleaf_abstract_reasoning.datasets import CATEGORIES
from looseleaf_abstract_reasoning.items import KINDS, REMAPPINGS
from looseleaf_abstract_reasoning.scores import Interval, Mark, bootstrap, delta, gamma, pairs, relative_delta

Point = tuple[float, Interval]
"""Number of a category, and a figure with its interval."""


def of_category(marks: Sequence[Mark], category: str) -> list[Mark]:
    """The marks that make up Gamma of a category: original symbols, but in symbolic reasoning the remapped ones."""
    return [mark for mark in marks if mark.item.category == category
            and (mark.item.kind == "original") != (category == "symbolic-reasoning")]


def categories_of(marks: Sequence[Mark]) -> list[str]:
    """The paper's categories that occur, in its order, then others."""
    found = dict.fromkeys([*CATEGORIES, *(mark.item.category for mark in marks)])
    return [name for name in found if of_category(marks, name)]


def write_report(report: Report, marks: Sequence[Mark]) -> None:
    """Everything that is to be said of ``marks``: Gamma, Delta, sub-datasets, figures and a few items."""
    names = categories_of(marks)
    _gamma(report, marks, names)
    _delta(report, marks, names)
    _datasets(report, marks)
    for kind in KINDS:
        mark = next((mark for mark in marks if mark.item.kind == kind), None)
        if mark is not None:
            report.examples.append((f"{mark.item.problem}, {kind}: right {mark.item.answer}, the model {mark.said}",
                                    mark.item.prompt))


def _gamma(report: Report, marks: Sequence[Mark], names: Sequence[str]) -> None:
    table = report.table("Gamma, the abstract reasoning score", [
        "category", "what", "items", "chance", "Gamma", "low", "high"],
        note="accuracy, and 95% bootstrap interval over items; symbolic reasoning: all three remappings together")
    for name in names:
        of = of_category(marks, name)
        table.add(name, CATEGORIES.get(name, ""), len(of), float(np.mean([mark.chance for mark in of])), *gamma(of))


def _delta(report: Report, marks: Sequence[Mark], names: Sequence[str]) -> None:
    table = report.table("Delta, the memory dependence score", [
        "category", "remapped", "problems", "Gamma", "after", "Delta", "low", "high", "of Gamma", "from", "to"],
        note="Gamma of the same problems before and after, absolute and as a share of Gamma; 95% bootstrap over "
             "problems. The paper has it for extended calculation alone. Guesses survive a remapping, so with choices "
             "Delta is at most Gamma less chance, but for luck")
    score: dict[str, list[Point]] = {kind: [] for kind in KINDS}
    gap: dict[str, list[Point]] = {kind: [] for kind in REMAPPINGS}
    places = [name for name in names if name != "symbolic-reasoning"]
    for at, name in enumerate(places, 1):
        score["original"].append((at, gamma(of_category(marks, name))))
        for kind in REMAPPINGS:
            rows = pairs(marks, kind, name)
            if not len(rows):
                continue
            found = delta(rows)
            before, after = rows.mean(0)
            table.add(name, kind, len(rows), float(before), float(after), *found,
                      *(None if math.isnan(value) else value for value in relative_delta(rows)))
            score[kind].append((at, bootstrap(rows, lambda means: means[:, 1])))
            gap[kind].append((at, found))
    legend = ", ".join(f"{at} {name}" for at, name in enumerate(places, 1))
    report.figure("Gamma in original and in remapped symbols", x_label="category", y_label="accuracy", note=legend,
                  series=_series(score))
    report.figure("Delta by what was remapped", x_label="category", y_label="loss of accuracy", note=legend,
                  series=_series(gap))


def _series(found: Mapping[str, Sequence[Point]]) -> list[Series]:
    """Points with their intervals, side by side where they belong to one category."""
    return [Series(kind, [at + 0.12 * k for at, _ in points], [value for _, (value, _, _) in points],
                   [low for _, (_, low, _) in points], [high for _, (_, _, high) in points], style="points")
            for k, (kind, points) in enumerate(found.items()) if points]


def _datasets(report: Report, marks: Sequence[Mark]) -> None:
    """Accuracy of each sub-dataset in each kind of symbols."""
    names = list(dict.fromkeys(mark.item.dataset for mark in marks))
    table = report.table("Sub-datasets", ["number", "sub-dataset", "category", "problems", *KINDS])
    image = []
    for number, name in enumerate(names):
        of = [mark for mark in marks if mark.item.dataset == name]
        row = [[mark.right for mark in of if mark.item.kind == kind] for kind in KINDS]
        accuracy = [float(np.mean(values)) if values else None for values in row]
        table.add(number, name, of[0].item.category, len({mark.item.problem for mark in of}), *accuracy)
        image.append([math.nan if value is None else value for value in accuracy])
    report.figure("Accuracy of each sub-dataset", x_label="0 original, 1 operators, 2 operands, 3 both",
                  y_label="number of the sub-dataset", image=image)
