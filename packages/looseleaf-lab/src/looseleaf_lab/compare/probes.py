"""Probes one after the other on the same models."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from looseleaf import Figure, Probe, Report, Table
from looseleaf import progress as progress_
from looseleaf_lab.compare import common
from looseleaf.resume import Cells


def compare_probes(models: Mapping[str, tuple[Any, Any]], probes: Mapping[str, Probe], *, inputs: Any = None,
                   seed: int = 0, state: str | os.PathLike[str] | None = None,
                   progress: bool | None = None) -> Report:
    """Run every probe on every model.

    Args:
        models: name -> (model, tokenizer).
        probes: name -> probe.
        inputs: the probes' data; None: each probe's built-in example.
        seed: given to the probes.
        state: folder for finished probes; the same call resumes.
        progress: show a progress bar; None: only on a terminal.

    Returns:
        Everything the probes reported, each title led by the probe; with several models their rows and curves stand
        side by side, see :func:`side_by_side`.
    """
    report = Report("Probes side by side", common.facts(models=", ".join(models), seed=seed))
    table = report.table("Probes", ["probe", "model", "seconds", "tables", "figures", "claims"])
    failed: dict[str, str] = {}
    cells, whose = Cells(state), {on: common.whose(model) for on, (model, _) in models.items()}
    found: dict[str, dict[str, Report]] = {}
    for name, on in progress_.track([(p, m) for p in probes for m in models], "probes", show=progress):
        model, tokenizer = models[on]
        probe = probes[name]

        def work(probe: Probe = probe, model: Any = model, tokenizer: Any = tokenizer) -> dict[str, Any]:
            start = time.perf_counter()
            made = probe.run(model, inputs, tokenizer=tokenizer, seed=seed, progress=progress)
            return {"seconds": time.perf_counter() - start, "report": made.to_dict()}

        key = {"what": "probe", "probe": name, **whose[on], "seed": seed, "parameters": common.identity(probe)}
        try:
            # data of the caller's own cannot be told apart by a key, so nothing of it is kept
            cell = cells.do(key, work) if inputs is None else work()
        except Exception as error:
            failed[f"{name} on {on}"] = common.reason(error)
            continue
        made = Report.from_dict(cell["report"])
        table.add(name, on, cell["seconds"], len(made.tables), len(made.figures), len(made.claims))
        found.setdefault(name, {})[on] = made
    for name, reports in found.items():
        if len(models) == 1:
            [(on, made)] = reports.items()
            report.extend(made, prefix=f"{name} on {on}: ")
        else:
            report.extend(side_by_side(reports), prefix=f"{name}: ")
    common.left_out(report, failed)
    return report


def side_by_side(reports: Mapping[str, Report]) -> Report:
    """Reports of one probe on several models as one.

    Tables of the same title and columns become one, with the model as its first column and rows of the same place
    below each other; curves of the same figure are drawn into one; facts that all share are said once. What only some
    models have, images, arrays and texts keep the model's name in their title.

    Args:
        reports: model -> its report.
    """
    out = Report("Side by side")
    facts = list(dict.fromkeys(name for r in reports.values() for name in r.facts))
    for name in facts:
        values = {on: r.facts[name] for on, r in reports.items() if name in r.facts}
        if len(values) == len(reports) and len({repr(v) for v in values.values()}) == 1:
            out.facts[name] = next(iter(values.values()))
        else:
            out.facts.update({f"{on}: {name}": value for on, value in values.items()})
    for shape in dict.fromkeys((t.title, tuple(t.columns)) for r in reports.values() for t in r.tables):
        same = [(on, t) for on, r in reports.items() for t in r.tables if (t.title, tuple(t.columns)) == shape]
        out.tables.append(_rows(same))
    for title in dict.fromkeys(f.title for r in reports.values() for f in r.figures):
        out.figures.extend(_curves([(on, f) for on, r in reports.items() for f in r.figures if f.title == title]))
    for on, report in reports.items():
        out.claims.extend(dataclasses.replace(c, statement=f"{on}: {c.statement}") for c in report.claims)
        out.arrays.update({f"{on}: {name}": values for name, values in report.arrays.items()})
        out.examples.extend((f"{on}: {label}", text) for label, text in report.examples)
        out.strips.extend(dataclasses.replace(s, title=f"{on}: {s.title}") for s in report.strips)
    return out


def _rows(tables: Sequence[tuple[str, Table]]) -> Table:
    first = tables[0][1]
    made = Table(first.title, ["model", *first.columns], note=first.note)
    for rows in zip_longest(*([[on, *row] for row in table.rows] for on, table in tables)):
        made.rows.extend(row for row in rows if row is not None)
    return made


def _curves(figures: Sequence[tuple[str, Figure]]) -> list[Figure]:
    first = figures[0][1]
    axes = {(f.x_label, f.y_label, f.x_log, f.y_log) for _, f in figures}
    if len(axes) > 1 or any(f.image is not None for _, f in figures):
        return [dataclasses.replace(f, title=f"{f.title}, {on}") for on, f in figures]
    series = [dataclasses.replace(s, name=f"{s.name}, {on}") for on, f in figures for s in f.series]
    return [dataclasses.replace(first, series=series)]
