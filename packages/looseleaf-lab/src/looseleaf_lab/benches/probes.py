"""Probes one after the other on the same models."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, ClassVar

from looseleaf import Figure, Probe, Report, Table
from looseleaf import progress as progress_
from looseleaf.plugin import Plugin
from looseleaf.probes.subject import parts
from looseleaf_lab import models
from looseleaf_lab.benches.bench import Bench, State, ready
from looseleaf_lab.facts import facts, identity, left_out, model_facts, model_name, reason
from looseleaf_lab.results import ResultCache


@dataclasses.dataclass
class Probes(Bench):
    """Probes on one language model, or on several side by side.

    Args:
        model: short names, folders or hub ids of causal language models.
        dtype: of the models' weights, such as bfloat16.
    """

    model: tuple[str, ...] = ("smollm2",)
    dtype: str = "float32"
    interface: ClassVar[type[Plugin]] = Probe

    def validate(self) -> None:
        """See :class:`Bench`."""
        self.check("model", len(self.model) > 0, "one model or more")

    def run(self, plugins: Mapping[str, Any], *, state: State = None, seed: int = 0,
            progress: bool | None = None) -> Report:
        """See :meth:`Bench.run` and :func:`compare_probes`."""
        subjects = {name: models.load(name, self.dtype, device=models.device()) for name in dict.fromkeys(self.model)}
        probes, failed = ready(plugins)
        report = compare_probes(subjects, probes, seed=seed, state=state, progress=progress)
        report.facts["model"] = ", ".join(f"{name} ({model_name(model)})" for name, (model, _) in subjects.items())
        left_out(report, failed)
        return report


def compare_probes(subjects: Mapping[str, Any], probes: Mapping[str, Probe], *, inputs: Any = None,
                   seed: int = 0, state: State = None, progress: bool | None = None) -> Report:
    """Run every probe on every subject.

    Args:
        subjects: name -> what probes are run on, such as a (model, tokenizer) pair or a pipeline.
        probes: name -> probe.
        inputs: the probes' data; None: each probe's built-in example.
        seed: given to the probes.
        state: folder for finished probes; the same call resumes. Nothing is kept of subjects without a torch module
            in them, which cannot be told apart, or with inputs of the caller's own.
        progress: show a progress bar; None: only on a terminal.

    Returns:
        Everything the probes reported, each title led by the probe; with several subjects their rows and curves stand
        side by side, see :func:`side_by_side`.
    """
    report = Report("Probes side by side", facts(models=", ".join(subjects), seed=seed))
    table = report.table("Probes", ["probe", "model", "seconds", "tables", "figures", "claims"])
    failed: dict[str, str] = {}
    cells, about = ResultCache(state), {on: _known(subject) for on, subject in subjects.items()}
    reports: dict[str, dict[str, Report]] = {}
    for name, on in progress_.track([(p, m) for p in probes for m in subjects], "probes", show=progress):
        probe, subject = probes[name], subjects[on]

        def work(probe: Probe = probe, subject: Any = subject) -> dict[str, Any]:
            start = time.perf_counter()
            found = probe.run(subject, inputs, seed=seed, progress=progress)
            return {"seconds": time.perf_counter() - start, "report": found.to_dict()}

        key = {"what": "probe", "probe": name, **about[on], "seed": seed, "parameters": identity(probe)}
        try:
            cell = cells.do(key, work) if inputs is None and about[on] else work()
        except Exception as error:  # one probe that fails must not cost the others their figures
            failed[f"{name} on {on}"] = reason(error)
            continue
        reports.setdefault(name, {})[on] = found = Report.from_dict(cell["report"])
        table.add(name, on, cell["seconds"], len(found.tables), len(found.figures), len(found.claims))
    for name, by_subject in reports.items():
        if len(subjects) == 1:
            [(on, found)] = by_subject.items()
            report.extend(found, prefix=f"{name} on {on}: ")
        else:
            report.extend(side_by_side(by_subject), prefix=f"{name}: ")
    left_out(report, failed)
    return report


def _known(subject: Any) -> dict[str, str]:
    try:
        return model_facts(parts(subject)[0])
    except TypeError:  # an environment, or whatever else a probe takes
        return {}


def side_by_side(reports: Mapping[str, Report]) -> Report:
    """Reports of one probe on several models as one.

    Tables of the same title and columns become one, with the model as its first column and rows of the same place
    below each other; curves of the same figure are drawn into one; facts that all have in common stand once. What
    only some models have, images, arrays and texts keep the model's name in their title.

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
    together = Table(first.title, ["model", *first.columns], note=first.note)
    for rows in zip_longest(*([[on, *row] for row in table.rows] for on, table in tables)):
        together.rows.extend(row for row in rows if row is not None)
    return together


def _curves(figures: Sequence[tuple[str, Figure]]) -> list[Figure]:
    first = figures[0][1]
    axes = {(f.x_label, f.y_label, f.x_log, f.y_log) for _, f in figures}
    if len(axes) > 1 or any(f.image is not None for _, f in figures):
        return [dataclasses.replace(f, title=f"{f.title}, {on}") for on, f in figures]
    series = [dataclasses.replace(s, name=f"{s.name}, {on}") for on, f in figures for s in f.series]
    return [dataclasses.replace(first, series=series)]
