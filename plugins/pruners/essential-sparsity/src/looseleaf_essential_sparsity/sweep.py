"""Measure a model at several sparsities."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from looseleaf import Report, Series, WeightPruner
from looseleaf.progress import track
from looseleaf_essential_sparsity.pruner import MagnitudePruner
from looseleaf_tickets.knee import Curve, Mean, essential_sparsity, relative_drops

LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The paper's sweep in steps of ten points."""

Evaluate = Callable[[nn.Module], "float | Sequence[float]"]
Point = tuple[float, list[float]]
"""A sparsity, and the metric of each evaluation batch there."""


def sparsity_curve(model: nn.Module, evaluate: Evaluate, levels: Sequence[float] = LEVELS, *,
                   pruner: WeightPruner | None = None, name: str = "metric", higher_is_better: bool = True,
                   mean: Mean = "mean", data: Any = None, progress: bool | None = None) -> Curve:
    """The metric of ``model`` at each sparsity; the model is dense again afterwards, also after an exception.

    Args:
        model: any model; its weights are masked, never overwritten.
        evaluate: model -> one number for each evaluation batch, the same batches each time (or a single number).
        levels: sparsities in [0, 1); 0.0 is added where it is missing.
        pruner: any pruner with a field ``sparsity``; None: global magnitude pruning.
        name, higher_is_better, mean: see :class:`Curve`.
        data: handed to ``pruner.prune(model, data)``.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: no levels, a level out of range, a pruner without ``sparsity``, or a dense metric that is not
            a number.
    """
    pruner = pruner or MagnitudePruner()
    if "sparsity" not in pruner.hyperparameters():
        raise ValueError(f"pruner: expected one with a field sparsity, got {type(pruner).__name__}")
    swept = sorted({0.0, *(float(s) for s in levels)})
    if len(swept) < 2:
        raise ValueError(f"levels: expected at least one sparsity above 0, got {list(levels)!r}")
    replace: Any = dataclasses.replace
    pruners = [replace(pruner, sparsity=s) for s in swept]  # all levels are checked before the first is measured
    rows = []
    for level, at in track(list(zip(swept, pruners)), f"sparsity of {name}", show=progress):
        rows.append(masked_metric(model, evaluate, at, data) if level else _numbers(evaluate(model)))
    return Curve(swept, rows, name, higher_is_better, mean)


def masked_metric(model: nn.Module, evaluate: Evaluate, pruner: WeightPruner, data: Any = None) -> list[float]:
    """The metric of ``model`` under the masks of ``pruner``, batch by batch; the model is dense again afterwards."""
    masks = pruner.prune(model, data)
    masks.apply(model)
    try:
        return _numbers(evaluate(model))
    finally:
        masks.remove(model)


def sparsity_sweep(model: nn.Module, evaluate: Evaluate, levels: Sequence[float] = LEVELS, *,
                   pruners: Mapping[str, WeightPruner] | None = None, name: str = "metric",
                   higher_is_better: bool = True, mean: Mean = "mean", tolerances: Sequence[float] = (0.01, 0.05),
                   seed: int = 0, data: Any = None, progress: bool | None = None) -> Report:
    """How much of ``model`` can go: the curve of each pruner, its essential sparsity and its knee.

    Args:
        model, evaluate, levels, name, higher_is_better, mean, data, progress: see :func:`sparsity_curve`.
        pruners: what to compare, by label; None: global and layer-wise magnitude pruning. A pruner whose pattern fixes
            the sparsity (2:4) gives one point.
        tolerances: see :func:`essential_sparsity`.
        seed: of the bootstrap.

    Returns:
        A report with one table of values, one of estimates, a figure, and the values of all batches as arrays.
    """
    if pruners is None:
        pruners = {"global": MagnitudePruner(), "layer": MagnitudePruner(scope="layer")}
    curves, points = curves_and_points(model, evaluate, levels, pruners, name=name, data=data, mean=mean,
                                       higher_is_better=higher_is_better, progress=progress)
    if points and not curves:  # points alone still need their dense reference
        curves["dense"] = Curve([0.0, 0.5], [_numbers(evaluate(model))] * 2, name, higher_is_better, mean)
    report = Report(f"Essential sparsity of {type(model).__name__}", facts={"metric": name, "seed": seed})
    add_curves(report, curves, points, tolerances, seed)
    return report


def curves_and_points(model: nn.Module, evaluate: Evaluate, levels: Sequence[float],
                      pruners: Mapping[str, WeightPruner], *, data: Any = None,
                      **options: Any) -> tuple[dict[str, Curve], dict[str, Point]]:
    """What :func:`sparsity_sweep` reports on: a curve of each pruner whose sparsity is free, a point of each other.

    Args:
        model, evaluate, levels, data: see :func:`sparsity_curve`, as for ``options``.
        pruners: by label.
    """
    curves: dict[str, Curve] = {}
    points: dict[str, Point] = {}
    for label, pruner in pruners.items():
        if getattr(pruner, "pattern", "unstructured") == "unstructured":
            curves[label] = sparsity_curve(model, evaluate, levels, pruner=pruner, data=data, **options)
        else:
            points[label] = (float(pruner.hyperparameters()["sparsity"]), masked_metric(model, evaluate, pruner, data))
    return curves, points


def add_curves(report: Report, curves: Mapping[str, Curve], points: Mapping[str, Point],
               tolerances: Sequence[float] = (0.01, 0.05), seed: int = 0) -> None:
    """Tables, a figure and arrays of measured curves and single points (label -> sparsity, batches)."""
    first = next(iter(curves.values()))
    name = first.name
    values = report.table(f"{name} by sparsity", ["pruner", "sparsity", name, "low", "high", "relative drop"],
                          note="low, high: 95% bootstrap over evaluation batches")
    figure = report.figure(f"{name} by sparsity", x_label="sparsity", y_label=name, y_log=first.mean == "exp-mean")
    estimates = report.table(f"essential sparsity ({name})", [
        "pruner", *(f"s*({t:.0%})" for t in tolerances), "knee", "step of the sweep"],
        note="s*(t): largest level within a relative drop of t; knee: largest distance to the chord of the curve")
    for label, curve in curves.items():
        if label == "dense":
            values.add("dense", 0.0, curve.values()[0], *curve.intervals(seed=seed)[0], 0.0)
            continue
        y, around, drops = curve.values(), curve.intervals(seed=seed), relative_drops(curve)
        for level, value, (low, high), drop in zip(curve.levels, y, around, drops):
            values.add(label, level, value, low, high, drop)
        figure.series.append(Series(label, curve.levels, y, [a for a, _ in around], [b for _, b in around]))
        knee = essential_sparsity(curve, tolerances, seed=seed)
        estimates.add(label, *(str(i) for i in knee.within.values()), str(knee.knee), knee.step)
        report.arrays[f"{name}: {label}"] = curve.batches
    for label, (level, batches) in points.items():
        pair = Curve([0.0, level], [first.batches[0], batches], name, first.higher_is_better, first.mean)
        low, high = pair.intervals(seed=seed)[1]
        values.add(label, level, pair.values()[1], low, high, relative_drops(pair)[1])
        figure.series.append(Series(label, [level], [pair.values()[1]], [low], [high], style="points"))
        report.arrays[f"{name}: {label}"] = [batches]


def _numbers(measured: Any) -> list[float]:
    return [float(x) for x in measured] if hasattr(measured, "__iter__") else [float(measured)]
