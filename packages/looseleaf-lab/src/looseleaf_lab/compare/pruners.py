"""Pruners over a sweep of sparsities, against the whole model and rivals."""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from looseleaf import Pruner, Report, Series
from looseleaf import progress as progress_
from looseleaf.statistics import bootstrap
from looseleaf_lab import data, metrics, timing
from looseleaf_lab.compare import common, llm_compressor
from looseleaf_lab.compare.prompts import few_shot
from looseleaf.resume import Cells, digest

if TYPE_CHECKING:
    from looseleaf_text import Task

WHOLE, MAGNITUDE, LAYER, RANDOM = "(whole model)", "(magnitude)", "(magnitude, by layer)", "(random)"
PATTERNS = {"4:8": (4, 8), "2:4": (2, 4)}


def compare_pruners(model: Any, tokenizer: Any, pruners: Mapping[str, type[Pruner] | Callable[[float], Pruner]],
                    sparsities: Sequence[float] = (0.1, 0.3, 0.5), *, context: int = 512, windows: int = 8,
                    tasks: Sequence[Task] = (), batches: Any = None, seed: int = 0, published: bool = True,
                    state: str | os.PathLike[str] | None = None, progress: bool | None = None) -> Report:
    """Perplexity, accuracy, time and memory of every pruner at every sparsity.

    Rivals are always there: the weights of smallest magnitude over all layers, by layer and in the patterns 4:8 and
    2:4, and random ones; Wanda and SparseGPT too where llm-compressor is installed.

    Args:
        model, tokenizer: a transformers causal language model; its weights are as before afterwards.
        pruners: name -> class, or function of the sparsity. A class with a field ``sparsity`` is swept; another
            is run once, at its own sparsity.
        sparsities: shares of weights to remove, 0 to below 1.
        context, windows: perplexity is measured on so many windows of so many tokens of the evaluation prose.
        tasks: classification tasks; accuracy on their test examples after two training examples of each class.
        batches: what pruners may learn from; None: 8 batches of ``context`` tokens of the calibration prose, as
            dictionaries with ``input_ids``, ``attention_mask`` and ``labels``.
        seed: of the random rival, the examples shown and the intervals.
        published: run Wanda and SparseGPT where llm-compressor is installed.
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
    made = {**_rivals(model, seed), **pruners, **(llm_compressor.rivals(tokenizer) if published else {})}
    jobs: list[tuple[str, float | None]] = [(WHOLE, None)]
    for name, maker in made.items():
        jobs += [(name, s) for s in sparsities] if _swept(maker) else [(name, None)]
    cells, whose, failed = Cells(state), common.whose(model), dict[str, str]()
    found: list[tuple[str, float | None, dict[str, Any]]] = []
    shown = {task.name: [task.fingerprint(), digest([str(e) for e in task.test])] for task in tasks}
    for name, sparsity in progress_.track(jobs, "pruners", show=progress):
        label = name if sparsity is None else f"{name} at {sparsity}"
        try:
            pruner = None if name == WHOLE else _make(made[name], sparsity)
            key = {"what": "pruner", "pruner": name, "sparsity": sparsity, **whose,
                   "context": context, "windows": windows, "seed": seed, "tasks": shown,
                   "parameters": common.identity(pruner) if pruner is not None else None}
            score = functools.partial(accuracies, tokenizer=tokenizer, tasks=tasks, seed=seed)
            work = functools.partial(measure, model, pruner, ids, context, batches, seed, first, score)
            found.append((name, sparsity, cells.do(key, work)))
        except Exception as error:
            failed[label] = common.reason(error)
    if published and (why := llm_compressor.missing()):
        failed["(Wanda), (SparseGPT)"] = why
    report = Report("Pruners side by side", common.facts(
        model=common.model_name(model), sparsities=", ".join(map(str, sparsities)), context=context, windows=windows,
        seed=seed, text="documentation of Python, evaluation part; calibration part where a pruner learns"))
    _show(report, found, list(made), [t.name for t in tasks], seed)
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


def accuracies(model: Any, tokenizer: Any, tasks: Sequence[Task], seed: int = 0) -> dict[str, list[float]]:
    """Task -> mark of each test example, after two training examples of each class."""
    from looseleaf_text import LocalModel

    local = LocalModel(model, tokenizer)
    return {task.name: task.evaluate(few_shot(task, random.Random(f"{task.name}:{seed}"), 2), local).marks
            for task in tasks}


def measure(model: Any, pruner: Any, ids: Any, context: int, batches: Any = None, seed: int = 0,
            bos: int | None = None, score: Callable[[Any], dict[str, list[float]]] | None = None) -> dict[str, Any]:
    """Prune, measure, and put the model back: sparsity, perplexity with interval, marks, seconds and peak bytes.

    Args:
        model: the whole model.
        pruner: a :class:`looseleaf.Pruner`, an object whose ``pruned(model, batches)`` returns a pruned copy, or None.
        ids, context, bos: the text, see :func:`looseleaf_lab.metrics.perplexity`.
        batches: what the pruner may learn from.
        seed: of the interval.
        score: a model -> marks by task.
    """
    sparsity, seconds, taken, masks, subject = 0.0, 0.0, None, None, model
    if pruner is not None:
        with timing.peak_memory() as peak:
            start = time.perf_counter()
            if hasattr(pruner, "pruned"):  # a method that also changes the weights it keeps
                subject = pruner.pruned(model, batches)
            else:
                masks = pruner.prune(model, batches)
            seconds = time.perf_counter() - start
        taken = peak.bytes
        sparsity = _zeros(subject) if masks is None else masks.sparsity()
    try:
        if masks is not None:
            masks.apply(model)
        result = metrics.perplexity(subject, ids, context, bos=bos)
        marks = score(subject) if score else {}
    finally:
        if masks is not None:
            masks.remove(model)
    value, low, high = result.interval(seed)
    return {"sparsity": sparsity, "perplexity": value, "low": low, "high": high, "losses": result.losses,
            "marks": marks, "seconds": seconds, "bytes": taken}


def _zeros(model: Any) -> float:
    from looseleaf import prunable_parameters

    weights = prunable_parameters(model).values()
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def _swept(made: Any) -> bool:
    if isinstance(made, type) and dataclasses.is_dataclass(made):
        return any(f.name == "sparsity" and f.init for f in dataclasses.fields(made))
    return not isinstance(made, _Once)


def _make(made: Any, sparsity: float | None) -> Any:
    if isinstance(made, _Once):
        return made.pruner
    if isinstance(made, type):
        return made() if sparsity is None else made(sparsity=sparsity)
    return made(sparsity)


@dataclasses.dataclass(frozen=True)
class _Once:
    """Not swept."""

    pruner: Any


def _rivals(model: Any, seed: int) -> dict[str, Any]:
    from looseleaf import NM, Unstructured, prunable_parameters
    from looseleaf.pruning.targets import input_dims

    dims = input_dims(model, prunable_parameters(model))
    return {RANDOM: lambda s: _Rival(RANDOM, Unstructured(s), seed),
            MAGNITUDE: lambda s: _Rival(MAGNITUDE, Unstructured(s)),
            LAYER: lambda s: _Rival(LAYER, Unstructured(s, "layer")),
            **{f"(magnitude, {p})": _Once(_Rival(f"(magnitude, {p})", NM(n, m, dims)))
               for p, (n, m) in PATTERNS.items()}}


class _Rival:
    """Smallest or random weights; not plugins, because no paper is behind them."""

    def __init__(self, name: str, rule: Any, seed: int | None = None) -> None:
        self.name, self.rule, self.seed = name, rule, seed

    def hyperparameters(self) -> dict[str, Any]:
        return {"name": self.name, **self.rule.describe(), "seed": self.seed}

    def prune(self, model: Any, data: Any = None) -> Any:
        import torch

        from looseleaf import prunable_parameters

        weights = prunable_parameters(model)
        if self.seed is None:
            scores = {n: w.detach().abs() for n, w in weights.items()}
        else:
            generator = torch.Generator().manual_seed(self.seed)
            scores = {n: torch.rand(w.shape, generator=generator).to(w.device) for n, w in weights.items()}
        return self.rule.select(scores)


# ------------------------------------------------------------------------------------------------- the report

def _show(report: Report, found: Sequence[tuple[str, float | None, dict[str, Any]]], names: Sequence[str],
          tasks: Sequence[str], seed: int) -> None:
    table = report.table("Pruning without retraining", [
        "pruner", "asked for", "sparsity", "perplexity", "from", "to",
        *(c for t in tasks for c in (f"accuracy, {t}", f"{t}: from", f"{t}: to")), "seconds", "peak MB"], note=(
        "sparsity: share of the prunable weights that was removed; interval: bootstrap over windows and over test "
        "examples; seconds and peak memory are those of pruning"))
    for name, wanted, cell in found:
        table.add(name, wanted, cell["sparsity"], cell["perplexity"], cell["low"], cell["high"],
                  *(x for t in tasks for x in bootstrap(cell["marks"][t], seed)), cell["seconds"],
                  None if cell["bytes"] is None else cell["bytes"] / 1e6)
    whole = next((c for n, _, c in found if n == WHOLE), None)
    curves: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        mine = [c for n, _, c in found if n == name and c["perplexity"] is not None]
        mine.sort(key=lambda c: c["sparsity"])
        if mine:
            curves[name] = [whole, *mine] if whole and len(mine) > 1 else mine
    series = [Series(name, [c["sparsity"] for c in points], [c["perplexity"] for c in points],
                     [c["low"] for c in points], [c["high"] for c in points]) for name, points in curves.items()]
    series += _knees(report, curves, seed)
    report.figure("Perplexity after pruning", x_label="sparsity", y_label="perplexity", y_log=True, series=series)
    for task in tasks:
        series = []
        for name, points in curves.items():
            mean, low, high = zip(*(bootstrap(c["marks"][task], seed) for c in points), strict=True)
            series.append(Series(name, [c["sparsity"] for c in points], list(mean), list(low), list(high)))
        report.figure(f"Accuracy after pruning, {task}", x_label="sparsity", y_label="accuracy", series=series)


def _knees(report: Report, curves: Mapping[str, Sequence[dict[str, Any]]], seed: int) -> list[Series]:
    """A table of essential sparsities, and a mark at each knee."""
    from looseleaf.pruning.knee import Curve, essential_sparsity

    swept = {name: points for name, points in curves.items() if len(points) > 2 and points[0]["sparsity"] == 0}
    if not swept:
        return []
    table = report.table("Essential sparsity", ["pruner", "within 1 %", "within 5 %", "knee", "from", "to"], note=(
        "within: the largest sparsity measured whose perplexity is at most so much worse; knee: where the loss turns, "
        "by its distance from the chord over the sparsities measured, with 95 % bootstrap over windows"))
    marks = []
    for name, points in swept.items():
        levels = [c["sparsity"] for c in points]
        curve = Curve(levels, [c["losses"] for c in points], "perplexity", False, "exp-mean")
        knee = essential_sparsity(curve, seed=seed)
        table.add(name, knee.within[0.01].value, knee.within[0.05].value, knee.knee.value, knee.knee.low,
                  knee.knee.high)
        if knee.knee.value is not None:
            marks.append((knee.knee.value, points[levels.index(knee.knee.value)]["perplexity"]))
    return [Series("knees", [x for x, _ in marks], [y for _, y in marks], style="points")] if marks else []
