"""Weight pruners without training: a language model over a sweep of sparsities, against the dense one and baselines."""

from __future__ import annotations

import dataclasses
import functools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from looseleaf import Report, Series, SetMetric, WeightPruner
from looseleaf import progress as progress_
from looseleaf.plugin import In, Plugin
from looseleaf.resume import digest
from looseleaf.statistics import bootstrap
from looseleaf_lab import data, metrics, models, timing
from looseleaf_lab.benches import llm_compressor
from looseleaf_lab.benches.bench import Bench, State
from looseleaf_lab.benches.prompts import few_shot
from looseleaf_lab.facts import facts, identity, left_out, model_facts, model_name, reason
from looseleaf_lab.results import ResultCache

if TYPE_CHECKING:
    from looseleaf_text import TextTask

DENSE, MAGNITUDE, LAYER, RANDOM = "(dense)", "(magnitude)", "(magnitude, by layer)", "(random)"
PATTERNS = {"4:8": (4, 8), "2:4": (2, 4)}


@dataclasses.dataclass
class PrunedWeights(Bench):
    """Weight pruners on a language model without retraining: perplexity and accuracy over sparsity.

    Args:
        model: short name, folder or hub id of a causal language model.
        dtype: of the model's weights, such as bfloat16.
        sparsity: fractions of the weights to remove.
        task: names of tasks of classification or generation on which the model is scored; without a name none.
        windows: windows of 512 tokens on which the perplexity is measured.
    """

    model: str = "smollm2"
    dtype: str = "float32"
    sparsity: Annotated[tuple[float, ...], In("[0, 1)")] = (0.1, 0.3, 0.5)
    task: tuple[str, ...] = ("topics",)
    windows: Annotated[int, In(">= 1")] = 8
    interface: ClassVar[type[Plugin]] = WeightPruner

    def validate(self) -> None:
        """See :class:`Bench`."""
        for name in self.task:
            data.check_task(name)

    def suits(self, plugin: Any) -> str | None:
        """See :meth:`Bench.suits`: the methods that need no training function."""
        from looseleaf_tickets import IterativePruner

        other = super().suits(plugin)
        iterative = not other and issubclass(plugin if isinstance(plugin, type) else type(plugin), IterativePruner)
        return "trains between its rounds: compared on small networks" if iterative else other

    def run(self, plugins: Mapping[str, Any], *, state: State = None, seed: int = 0,
            progress: bool | None = None) -> Report:
        """See :meth:`Bench.run` and :func:`compare_pruners`."""
        tasks: Any = [data.task(name, seed, train=48, dev=4, test=96) for name in self.task]
        model, tokenizer = models.load(self.model, self.dtype, device=models.device())
        report = compare_pruners(model, tokenizer, plugins, self.sparsity, windows=self.windows, tasks=tasks, seed=seed,
                                 state=state, progress=progress)
        report.facts["model"] = f"{self.model} ({model_name(model)})"
        return report


Swept = type[WeightPruner] | WeightPruner | Callable[[float], Any]
"""A pruner to sweep: class, instance, or function of the sparsity. One without a field ``sparsity`` is run once."""


def compare_pruners(model: Any, tokenizer: Any, pruners: Mapping[str, Swept],
                    sparsities: Sequence[float] = (0.1, 0.3, 0.5), *, context: int = 512, windows: int = 8,
                    tasks: Sequence[TextTask] = (), batches: Any = None, seed: int = 0, published: bool = True,
                    state: State = None, progress: bool | None = None) -> Report:
    """Perplexity, accuracy, time and memory of every pruner at every sparsity.

    Baselines are always there: the weights of smallest magnitude over all layers, by layer and in the patterns 4:8 and
    2:4, and random ones; Wanda and SparseGPT too where llm-compressor is installed.

    Args:
        model, tokenizer: a transformers causal language model; its weights are as before afterwards.
        pruners: name -> class, instance, or function of the sparsity. Where there is a field ``sparsity`` it is swept;
            another pruner is run once, at its own sparsity.
        sparsities: fractions of the weights to remove, in [0, 1).
        context, windows: perplexity is measured on so many windows of so many tokens of the evaluation prose.
        tasks: scores on their test examples, after two training examples of each class.
        batches: what pruners may learn from; None: 8 batches of ``context`` tokens of the calibration prose, as
            dictionaries with ``input_ids``, ``attention_mask`` and ``labels``.
        seed: of the random baseline, the examples shown and the intervals.
        published: run Wanda and SparseGPT where llm-compressor is installed.
        state: folder for finished cells; the same call resumes.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: a sparsity out of range.
    """
    for asked in sparsities:
        if not 0 <= asked < 1:
            raise ValueError(f"sparsities: expected numbers in [0, 1), got {asked}")
    for task in tasks:
        if isinstance(task.metric, SetMetric):
            raise ValueError(f"task {task.name!r}: expected a metric of single predictions, got a SetMetric")
    device = next(model.parameters()).device
    ids = data.prose_ids(tokenizer, context * windows, "evaluation").to(device)
    batches = calibration_batches(tokenizer, context, device=device) if batches is None else batches
    first = data.bos(tokenizer)
    methods = {**_baselines(model, seed), **pruners, **(llm_compressor.baselines(tokenizer) if published else {})}
    jobs: list[tuple[str, float | None]] = [(DENSE, None)]
    for name, method in methods.items():
        jobs += [(name, s) for s in sparsities] if swept(method) else [(name, None)]
    cells, about, failed = ResultCache(state), model_facts(model), dict[str, str]()
    found: list[tuple[str, float | None, dict[str, Any]]] = []
    shown = {task.name: [task.fingerprint(), digest([str(e) for e in task.test])] for task in tasks}
    for name, sparsity in progress_.track(jobs, "pruners", show=progress):
        label = name if sparsity is None else f"{name} at {sparsity}"
        try:
            pruner = None if name == DENSE else at_sparsity(methods[name], sparsity)
            key = {"what": "pruner", "pruner": name, "sparsity": sparsity, **about,
                   "context": context, "windows": windows, "seed": seed, "tasks": shown,
                   "parameters": identity(pruner) if pruner is not None else None}
            score = functools.partial(accuracies, tokenizer=tokenizer, tasks=tasks, seed=seed)
            work = functools.partial(measure, model, pruner, ids, context, batches, seed, first, score)
            found.append((name, sparsity, cells.do(key, work)))
        except Exception as error:  # one pruner that fails must not cost the others their figures
            failed[label] = reason(error)
    if published and (why := llm_compressor.missing()):
        failed["(Wanda), (SparseGPT)"] = why
    report = Report("Pruners side by side", facts(
        model=model_name(model), sparsities=", ".join(map(str, sparsities)), context=context, windows=windows,
        seed=seed, text="documentation of Python, evaluation part; calibration part where a pruner learns"))
    _show(report, found, list(methods), [t.name for t in tasks], seed)
    left_out(report, failed)
    return report


def calibration_batches(tokenizer: Any, context: int = 512, count: int = 8, device: Any = None) -> list[dict[str, Any]]:
    """``count`` batches of one row of the calibration prose: ``input_ids``, ``attention_mask`` and ``labels``."""
    import torch

    ids = data.prose_ids(tokenizer, context * count, "calibration").reshape(count, 1, context).to(device)
    first = data.bos(tokenizer)
    if first is not None:
        ids[..., 0] = first
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def accuracies(model: Any, tokenizer: Any, tasks: Sequence[TextTask], seed: int = 0) -> dict[str, list[float]]:
    """Task -> score of each test example, after two training examples of each class."""
    from looseleaf_text import LocalModel

    local = LocalModel(model, tokenizer)
    return {task.name: task.evaluate(few_shot(task, random.Random(f"{task.name}:{seed}"), 2).on(local)).scores or []
            for task in tasks}


def measure(model: Any, pruner: Any, ids: Any, context: int, batches: Any = None, seed: int = 0,
            bos: int | None = None, score: Callable[[Any], dict[str, list[float]]] | None = None) -> dict[str, Any]:
    """Prune, measure, and put the model back: sparsity, perplexity with interval, scores, seconds and peak bytes.

    Args:
        model: the dense model.
        pruner: a :class:`looseleaf.WeightPruner`; an object whose ``pruned(model, batches)`` gives a pruned copy; None.
        ids, context, bos: the text, see :func:`looseleaf_lab.metrics.perplexity`.
        batches: what the pruner may learn from.
        seed: of the interval.
        score: a model -> scores by task.
    """
    sparsity, seconds, peak_bytes, masks, subject = 0.0, 0.0, None, None, model
    if pruner is not None:
        with timing.peak_memory() as peak:
            start = time.perf_counter()
            if hasattr(pruner, "pruned"):  # a method that also changes the weights it keeps
                subject = pruner.pruned(model, batches)
            else:
                masks = pruner.prune(model, batches)
            seconds = time.perf_counter() - start
        peak_bytes = peak.bytes
        sparsity = _zeros(subject) if masks is None else masks.sparsity()
    try:
        if masks is not None:
            masks.apply(model)
        result = metrics.perplexity(subject, ids, context, bos=bos)
        scores = score(subject) if score else {}
    finally:
        if masks is not None:
            masks.remove(model)
    value, low, high = result.interval(seed)
    return {"sparsity": sparsity, "perplexity": value, "low": low, "high": high, "losses": result.losses,
            "scores": scores, "seconds": seconds, "bytes": peak_bytes}


def _zeros(model: Any) -> float:
    from looseleaf import prunable_parameters

    weights = prunable_parameters(model).values()
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def swept(method: Any) -> bool:
    """Whether a :data:`Swept` is measured at several sparsities."""
    if dataclasses.is_dataclass(method):
        return any(f.name == "sparsity" and f.init for f in dataclasses.fields(method))
    return not isinstance(method, _Once)


def at_sparsity(method: Any, sparsity: float | None) -> Any:
    """The pruner of a :data:`Swept` at one sparsity; None: as it is."""
    if isinstance(method, _Once):
        return method.pruner
    if isinstance(method, type):
        return method() if sparsity is None else method(sparsity=sparsity)
    if hasattr(method, "prune"):
        return method if sparsity is None else dataclasses.replace(method, sparsity=sparsity)
    return method(sparsity)


@dataclasses.dataclass(frozen=True)
class _Once:
    """Not swept."""

    pruner: Any


def _baselines(model: Any, seed: int) -> dict[str, Any]:
    from looseleaf import NM, Unstructured, prunable_parameters
    from looseleaf.pruning.targets import input_dims

    dims = input_dims(model, prunable_parameters(model))
    return {RANDOM: lambda s: Baseline(RANDOM, Unstructured(s), seed),
            MAGNITUDE: lambda s: Baseline(MAGNITUDE, Unstructured(s)),
            LAYER: lambda s: Baseline(LAYER, Unstructured(s, "layer")),
            **{f"(magnitude, {p})": _Once(Baseline(f"(magnitude, {p})", NM(n, m, dims)))
               for p, (n, m) in PATTERNS.items()}}


class Baseline:
    """Smallest or random weights; not a plugin, because no paper is behind it.

    Args:
        name: for people.
        rule: which weights are kept.
        seed: of random scores; None: magnitudes.
    """

    def __init__(self, name: str, rule: Any, seed: int | None = None) -> None:
        self.name, self.rule, self.seed = name, rule, seed

    def hyperparameters(self) -> dict[str, Any]:
        """What decides the result."""
        return {"name": self.name, **self.rule.describe(), "seed": self.seed}

    def prune(self, model: Any, data: Any = None) -> Any:
        """As :meth:`looseleaf.WeightPruner.prune`."""
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
        "pruner", "asked for", "sparsity", "perplexity", "low", "high",
        *(c for t in tasks for c in (f"accuracy, {t}", f"{t}: low", f"{t}: high")), "seconds", "peak MB"], note=(
        "sparsity: fraction of the prunable weights that was removed; interval: bootstrap over windows and over test "
        "examples; seconds and peak memory are those of pruning"))
    for name, wanted, cell in found:
        table.add(name, wanted, cell["sparsity"], cell["perplexity"], cell["low"], cell["high"],
                  *(x for t in tasks for x in bootstrap(cell["scores"][t], seed)), cell["seconds"],
                  None if cell["bytes"] is None else cell["bytes"] / 1e6)
    dense = next((c for n, _, c in found if n == DENSE), None)
    curves: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        points = [c for n, _, c in found if n == name and c["perplexity"] is not None]
        points.sort(key=lambda c: c["sparsity"])
        if points:
            curves[name] = [dense, *points] if dense and len(points) > 1 else points
    series = [Series(name, [c["sparsity"] for c in points], [c["perplexity"] for c in points],
                     [c["low"] for c in points], [c["high"] for c in points]) for name, points in curves.items()]
    series += _knees(report, curves, seed)
    report.figure("Perplexity after pruning", x_label="sparsity", y_label="perplexity", y_log=True, series=series)
    for task in tasks:
        series = []
        for name, points in curves.items():
            mean, low, high = zip(*(bootstrap(c["scores"][task], seed) for c in points), strict=True)
            series.append(Series(name, [c["sparsity"] for c in points], list(mean), list(low), list(high)))
        report.figure(f"Accuracy after pruning, {task}", x_label="sparsity", y_label="accuracy", series=series)


def _knees(report: Report, curves: Mapping[str, Sequence[dict[str, Any]]], seed: int) -> list[Series]:
    """A table of essential sparsities, and the points of the knees."""
    from looseleaf_tickets.knee import Curve, essential_sparsity

    sweeps = {name: points for name, points in curves.items() if len(points) > 2 and points[0]["sparsity"] == 0}
    if not sweeps:
        return []
    table = report.table("Essential sparsity", ["pruner", "within 1 %", "within 5 %", "knee", "low", "high"], note=(
        "within: the largest sparsity measured whose perplexity is at most so much worse; knee: where the loss turns, "
        "by its distance from the chord over the sparsities measured, with 95 % bootstrap over windows"))
    knees = []
    for name, points in sweeps.items():
        levels = [c["sparsity"] for c in points]
        curve = Curve(levels, [c["losses"] for c in points], "perplexity", False, "exp-mean")
        knee = essential_sparsity(curve, seed=seed)
        table.add(name, knee.within[0.01].value, knee.within[0.05].value, knee.knee.value, knee.knee.low,
                  knee.knee.high)
        if knee.knee.value is not None:
            knees.append((knee.knee.value, points[levels.index(knee.knee.value)]["perplexity"]))
    return [Series("knees", [x for x, _ in knees], [y for _, y in knees], style="points")] if knees else []
