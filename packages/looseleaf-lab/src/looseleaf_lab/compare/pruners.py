"""Pruners over a sweep of sparsities, against the whole model and trivial rivals."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from looseleaf import Pruner, Report, Series
from looseleaf import progress as progress_
from looseleaf_lab import data, metrics, timing
from looseleaf_lab.compare import common
from looseleaf_lab.state import Cells

WHOLE, MAGNITUDE, RANDOM = "(whole model)", "(magnitude)", "(random)"


def compare_pruners(model: Any, tokenizer: Any, pruners: Mapping[str, type[Pruner] | Callable[[float], Pruner]],
                    sparsities: Sequence[float] = (0.1, 0.3, 0.5), *, context: int = 512, windows: int = 8,
                    batches: Any = None, seed: int = 0, state: str | os.PathLike[str] | None = None,
                    progress: bool | None = None) -> Report:
    """Perplexity, time and memory of every pruner at every sparsity.

    Two rivals are always there: the weights of smallest magnitude over all layers, and random ones.

    Args:
        model, tokenizer: a transformers causal language model; its weights are as before afterwards.
        pruners: name -> class, or function of the sparsity. A class with a field ``sparsity`` is swept; another
            is run once, at its own sparsity.
        sparsities: shares of weights to remove, 0 to below 1.
        context, windows: perplexity is measured on so many windows of so many tokens of the evaluation prose.
        batches: what pruners may learn from; None: 8 batches of ``context`` tokens of the calibration prose, as
            dictionaries with ``input_ids``, ``attention_mask`` and ``labels``.
        seed: of the random rival and the intervals.
        state: folder for finished cells; the same call resumes.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: a sparsity out of range.
    """
    for asked in sparsities:
        if not 0 <= asked < 1:
            raise ValueError(f"sparsity={asked}: allowed is 0 to below 1")
    device = next(model.parameters()).device
    ids = data.prose_ids(tokenizer, context * windows, "evaluation").to(device)
    batches = calibration_batches(tokenizer, context, device=device) if batches is None else batches
    first = data.bos(tokenizer)
    jobs: list[tuple[str, float | None]] = [(WHOLE, None)]
    for name in (RANDOM, MAGNITUDE, *pruners):
        jobs += [(name, s) for s in sparsities] if _swept(pruners.get(name)) else [(name, None)]
    cells, failed = Cells(state), dict[str, str]()
    whose = common.whose(model)
    found: list[tuple[str, float | None, dict[str, Any]]] = []
    for name, sparsity in progress_.track(jobs, "pruners", show=progress):
        label = name if sparsity is None else f"{name} at {sparsity}"
        try:
            pruner = None if name == WHOLE else _make(name, pruners, sparsity, seed)
            key = {"what": "pruner", "pruner": name, "sparsity": sparsity, **whose,
                   "context": context, "windows": windows, "seed": seed,
                   "parameters": common.identity(pruner) if pruner is not None else None}
            found.append((name, sparsity, cells.do(key, lambda p=pruner: measure(  # type: ignore[misc]
                model, p, ids, context, batches, seed, first))))
        except Exception as error:
            failed[label] = common.reason(error)
    report = Report("Pruners side by side", common.facts(
        model=common.model_name(model), sparsities=", ".join(map(str, sparsities)), context=context, windows=windows,
        seed=seed, text="documentation of Python, evaluation part; calibration part where a pruner learns"))
    table = report.table("Pruning without retraining", [
        "pruner", "asked for", "sparsity", "perplexity", "from", "to", "seconds", "peak MB"], note=(
        "sparsity: share of the prunable weights that was removed; interval: bootstrap over windows; "
        "seconds and peak memory are those of finding the masks"))
    for name, wanted, cell in found:
        table.add(name, wanted, cell["sparsity"], cell["perplexity"], cell["low"], cell["high"], cell["seconds"],
                  None if cell["bytes"] is None else cell["bytes"] / 1e6)
    whole = next((c for n, _, c in found if n == WHOLE), None)
    series = []
    for name in (RANDOM, MAGNITUDE, *pruners):
        mine = [c for n, _, c in found if n == name and c["perplexity"] is not None]
        mine.sort(key=lambda c: c["sparsity"])
        if mine:
            points = [whole, *mine] if whole and len(mine) > 1 else mine
            series.append(Series(name, [c["sparsity"] for c in points], [c["perplexity"] for c in points],
                                 [c["low"] for c in points], [c["high"] for c in points]))
    report.figure("Perplexity after pruning", x_label="sparsity", y_label="perplexity", y_log=True, series=series)
    common.left_out(report, failed)
    return report


def calibration_batches(tokenizer: Any, context: int = 512, count: int = 8, device: Any = None) -> list[dict[str, Any]]:
    """``count`` batches of one row of the calibration prose: ``input_ids``, ``attention_mask`` and ``labels``."""
    import torch

    ids = data.prose_ids(tokenizer, context * count, "calibration").reshape(count, 1, context).to(device)
    first = data.bos(tokenizer)
    if first is not None:
        ids[..., 0] = first
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def measure(model: Any, pruner: Pruner | None, ids: Any, context: int, batches: Any = None,
            seed: int = 0, bos: int | None = None) -> dict[str, Any]:
    """Prune, measure, and put the model back: sparsity, perplexity with interval, seconds and peak bytes."""
    sparsity, seconds, taken = 0.0, 0.0, None
    masks = None
    if pruner is not None:
        with timing.peak_memory() as peak:
            start = time.perf_counter()
            masks = pruner.prune(model, batches)
            seconds = time.perf_counter() - start
        taken, sparsity = peak.bytes, masks.sparsity()
        masks.apply(model)
    try:
        value, low, high = metrics.perplexity(model, ids, context, bos=bos).interval(seed)
    finally:
        if masks is not None:
            masks.remove(model)
    return {"sparsity": sparsity, "perplexity": value, "low": low, "high": high, "seconds": seconds, "bytes": taken}


def _swept(made: Any) -> bool:
    if isinstance(made, type) and dataclasses.is_dataclass(made):
        return any(f.name == "sparsity" and f.init for f in dataclasses.fields(made))
    return True


def _make(name: str, pruners: Mapping[str, Any], sparsity: float | None, seed: int) -> Any:
    if name in (MAGNITUDE, RANDOM):
        return _Rival(name, 0.0 if sparsity is None else sparsity, seed)
    made = pruners[name]
    if isinstance(made, type):
        return made() if sparsity is None else made(sparsity=sparsity)
    return made(sparsity)


class _Rival:
    """Smallest or random weights; not plugins, because no paper is behind them."""

    def __init__(self, name: str, sparsity: float, seed: int) -> None:
        self.name, self.sparsity, self.seed = name, sparsity, seed

    def parameters(self) -> dict[str, Any]:
        return {"name": self.name, "sparsity": self.sparsity, "seed": self.seed}

    def prune(self, model: Any, data: Any = None) -> Any:
        import torch

        from looseleaf import Unstructured, prunable_parameters

        weights = prunable_parameters(model)
        if self.name == MAGNITUDE:
            scores = {n: w.detach().abs() for n, w in weights.items()}
        else:
            generator = torch.Generator().manual_seed(self.seed)
            scores = {n: torch.rand(w.shape, generator=generator).to(w.device) for n, w in weights.items()}
        return Unstructured(self.sparsity).select(scores)
