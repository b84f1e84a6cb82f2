"""Probes one after the other on the same models."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from looseleaf import Probe, Report
from looseleaf import progress as progress_
from looseleaf_lab.compare import common
from looseleaf_lab.state import Cells


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
        Everything the probes reported, each title led by probe and model.
    """
    report = Report("Probes side by side", common.facts(models=", ".join(models), seed=seed))
    table = report.table("Probes", ["probe", "model", "seconds", "tables", "figures", "claims"])
    failed: dict[str, str] = {}
    cells = Cells(state)
    pairs = [(p, m) for p in probes for m in models]
    for name, on in progress_.track(pairs, "probes", show=progress):
        model, tokenizer = models[on]
        probe = probes[name]

        def work(probe: Probe = probe, model: Any = model, tokenizer: Any = tokenizer) -> dict[str, Any]:
            start = time.perf_counter()
            made = probe.run(model, inputs, tokenizer=tokenizer, seed=seed, progress=progress)
            return {"seconds": time.perf_counter() - start, "report": made.to_dict()}

        key = {"what": "probe", "probe": name, "model": common.model_name(model), "seed": seed,
               "parameters": common.identity(probe)}
        try:
            # data of the caller's own cannot be told apart by a key, so nothing of it is kept
            found = cells.do(key, work) if inputs is None else work()
        except Exception as error:
            failed[f"{name} on {on}"] = common.reason(error)
            continue
        made = Report.from_dict(found["report"])
        table.add(name, on, found["seconds"], len(made.tables), len(made.figures), len(made.claims))
        report.extend(made, prefix=f"{name} on {on}: ")
    common.left_out(report, failed)
    return report
