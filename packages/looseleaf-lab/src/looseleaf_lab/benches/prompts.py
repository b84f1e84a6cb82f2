"""Prompt optimisers under equal budgets, on any task and model."""

from __future__ import annotations

import dataclasses
import functools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from looseleaf import Budget, BudgetExhausted, Evaluation, Example, Predictor, PromptOptimizer, Report, Series, Task
from looseleaf import progress as progress_
from looseleaf.fingerprint import content_fingerprint, fingerprint
from looseleaf.plugin import In, Plugin
from looseleaf.resume import digest
from looseleaf.statistics import Interval, bootstrap
from looseleaf_lab import data, models
from looseleaf_lab.benches import dspy_few_shot
from looseleaf_lab.benches.bench import Bench, State, ready
from looseleaf_lab.facts import facts, identity, left_out, model_name, reason
from looseleaf_lab.results import ResultCache
from looseleaf_text import LanguageModel, LocalModel, TextPrompt, TextTask

PLAIN, FEW, SEARCH, OWN = "(plain)", "(few-shot)", "(random search)", "(the model's own)"
Baseline = Callable[[Any, Any, Budget, int], Any]
"""(task, model, budget, seed) -> a prompt: what optimisers must be better than."""
HALVES = 200


@dataclasses.dataclass
class TextPrompts(Bench):
    """Prompt optimisers for language models, each search with the same budget, against plain and few-shot prompts.

    Args:
        model: short name, folder or hub id of a causal language model.
        dtype: of the model's weights, such as bfloat16.
        task: names of tasks (classification, generation, embeddings), or module:function for tasks of your own.
        calls: budget of each search in model calls; several show how scores grow with it.
        seeds: searches with each optimiser, from --seed on.
        shots: exemplars of each class in the few-shot baselines.
    """

    model: str = "smollm2"
    dtype: str = "float32"
    task: tuple[str, ...] = ("sentiment", "topics", "neighbours")
    calls: Annotated[tuple[int, ...], In(">= 1")] = (2000,)
    seeds: Annotated[int, In(">= 1")] = 1
    shots: Annotated[int, In(">= 1")] = 2
    interface: ClassVar[type[Plugin]] = PromptOptimizer

    def validate(self) -> None:
        """See :class:`Bench`."""
        for name in self.task:
            data.check_task(name)
        self.check("task", len(self.task) > 0, "one task or more")
        self.check("calls", len(self.calls) > 0, "one budget or more")

    def suits(self, plugin: Any) -> str | None:
        """See :meth:`Bench.suits`: the optimisers that accept a local language model."""
        other = super().suits(plugin)
        if other or issubclass(LocalModel, plugin.accepts):
            return other
        return f"for a {plugin.accepts.__name__}, not for language models"

    def run(self, plugins: Mapping[str, Any], *, state: State = None, seed: int = 0,
            progress: bool | None = None) -> Report:
        """See :meth:`Bench.run` and :func:`compare_prompts`."""
        tasks = [data.task(name, seed, train=48, dev=48, test=96) for name in self.task]
        model = LocalModel(*models.load(self.model, self.dtype, device=models.device()))
        optimizers, failed = ready(plugins)
        report = compare_prompts(model, optimizers, tasks, calls=self.calls, shots=self.shots,
                                 seeds=range(seed, seed + self.seeds), state=state, progress=progress)
        report.facts["model"] = f"{self.model} ({model_name(model.model)})"
        left_out(report, failed)
        return report


def compare_prompts(model: Any, optimizers: Mapping[str, PromptOptimizer], tasks: Sequence[Task], *,
                    calls: int | Sequence[int] = 2000, seeds: Sequence[int] = (0,), shots: int = 2,
                    baselines: Mapping[str, Baseline] | None = None, published: bool = True, state: State = None,
                    progress: bool | None = None) -> Report:
    """Scores on dev and test, and the cost, of every optimiser on every task, all with the same budget of calls.

    An optimiser that cannot work with a task or the model says so and is listed as left out.

    Args:
        model: what the prompts are for, of any type that the optimisers accept.
        optimizers: name -> optimiser.
        tasks: with dev and test examples; of any inputs and metric.
        calls: budget of each search in model calls; several give the score as the budget grows, each from the start.
            Tables of summaries are for the largest.
        seeds: each search is run once with each.
        shots: exemplars of each class in the few-shot baselines.
        baselines: name -> ``(task, model, budget, seed) -> Prompt``; None: those of the task. For tasks of text they
            are the plain prompt, ``shots`` random exemplars of each class, and the best of as many random sets of
            exemplars as the budget allows; for embeddings of texts the model's own.
        published: run DSPy's few-shot optimiser too where DSPy is installed and the task is one of text.
        state: folder for finished and for interrupted searches; the same call resumes.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: no task, a task without dev or test, or calls below 1.
    """
    budgets = [calls] if isinstance(calls, int) else sorted(calls)
    if not tasks or not budgets or budgets[0] < 1 or not seeds:
        raise ValueError(f"compare_prompts: expected a task, calls >= 1 and a seed, or more of them, got {len(tasks)} "
                         f"tasks, calls={calls}, {len(seeds)} seeds")
    for task in tasks:
        task.validate()
        if not task.dev or not task.test:
            raise ValueError(f"task {task.name!r}: expected dev and test examples to compare on, got {len(task.dev)} "
                             f"and {len(task.test)}")
    cells, failed, about = ResultCache(state), dict[str, str](), _about(model)
    runs: list[tuple[Task, str, int, dict[str, Any]]] = []
    methods = {task.name: _methods(task, model, baselines, optimizers, shots, published) for task in tasks}
    jobs = [(t, n, s, b) for t in tasks for n in methods[t.name] for s in seeds
            for b in (budgets[-1:] if n in (PLAIN, FEW, OWN) else budgets)]
    for task, name, seed, most in progress_.track(jobs, "searches", show=progress):
        method = methods[task.name][name]
        key = {"what": "prompt", "task": task.name, "optimizer": name, "seed": seed, "calls": most, "shots": shots,
               **about, "examples": task.fingerprint(), "test": content_fingerprint(list(task.test)),
               "parameters": identity(method) if hasattr(method, "optimize") else None}
        folder = None if state is None else Path(state) / "searches" / digest(key)
        try:
            work = functools.partial(measure, task, method, model, most, seed, folder, progress)
            runs.append((task, name, seed, cells.do(key, work)))
        except Exception as error:  # one optimiser that fails must not cost the others their figures
            failed[f"{name} on {task.name}, seed {seed}"] = reason(error)
    report = Report("Prompt optimisers side by side", facts(
        model=about["model"], tasks=", ".join(t.name for t in tasks), calls=", ".join(map(str, budgets)),
        seeds=", ".join(map(str, seeds))))
    _show(report, runs, budgets)
    left_out(report, failed)
    return report


def measure(task: Task, method: Any, model: Any, calls: int, seed: int, state: Path | None = None,
            progress: bool | None = None) -> dict[str, Any]:
    """One search, and what its prompt is worth: scores on dev and test, cost, length, curve and the prompt itself.

    Args:
        task, model: what to search on and for.
        method: an optimiser or a :data:`Baseline`.
        calls: budget of the search.
        seed: of search and intervals.
        state: where an interrupted search goes on.
        progress: show a progress bar; None: only on a terminal.
    """
    budget = Budget(calls=calls)
    start, tokens_before = time.perf_counter(), getattr(model, "tokens", 0)
    if hasattr(method, "optimize"):
        prompt = method.optimize(task, model, budget=budget, seed=seed, state_dir=state, progress=progress)
    else:
        prompt = method(task, model, budget, seed)
    seconds = time.perf_counter() - start
    used, tokens = budget.used, getattr(model, "tokens", 0) - tokens_before
    predictor = prompt if isinstance(prompt, Predictor) else prompt.on(model)
    info = getattr(prompt, "info", {})
    dev, test = task.evaluate(predictor, "dev"), task.evaluate(predictor, "test")
    text = _shown(prompt, task.test[0])
    length = None if text is None or not isinstance(task, TextTask) else (
        model.count_tokens(text) - model.count_tokens(task.show(task.test[0])))
    return {
        "budget": calls, "dev": dev.score, "test": test.score, "scores": test.scores,
        "interval": interval(task, test, seed), "seconds": seconds,
        # a search that was resumed has spent more than this process saw
        "calls": int(used["calls"]), "tokens": max(int(used["tokens"]), tokens), "length": length,
        "stopped": str(info.get("stopped", "done")), "curve": _curve(info), "prompt": text}


def interval(task: Task, evaluation: Evaluation, seed: int = 0) -> Interval:
    """The score on the test examples with a 95 % interval.

    Bootstrap over examples where each has a score. A metric of the whole set is computed on random halves, whose
    spread is that of the whole set's score (the delete-half jackknife): repeated examples would mislead some metrics.
    """
    if evaluation.scores is not None:
        return bootstrap(evaluation.scores, seed)
    import numpy as np

    rng, examples, rows = np.random.default_rng(seed), list(task.test), evaluation.class_scores
    values = []
    for _ in range(HALVES):
        half = sorted(rng.permutation(len(examples))[:(len(examples) + 1) // 2].tolist())
        part = task.rate([evaluation.predictions[n] for n in half], [examples[n] for n in half],
                         None if rows is None else [rows[n] for n in half])
        values.append(part.score)
    low, high = np.quantile(np.array(values) - np.mean(values), [0.025, 0.975])
    return Interval(evaluation.score, evaluation.score + float(low), evaluation.score + float(high))


# ------------------------------------------------------------------------------------------------- baselines

def _methods(task: Task, model: Any, baselines: Mapping[str, Baseline] | None,
             optimizers: Mapping[str, PromptOptimizer], shots: int, published: bool) -> dict[str, Any]:
    """Name -> baseline or optimiser, in the order of the tables."""
    if baselines is not None:
        return {**baselines, **optimizers}
    if not isinstance(task, TextTask) or not isinstance(model, LanguageModel):
        return dict(optimizers)
    if not _has_answers(task):
        return {OWN: lambda task, model, budget, seed: OwnEmbeddings(task, model), **optimizers}
    few = functools.partial(few_shot_baseline, shots=shots)
    dspy = {dspy_few_shot.NAME: dspy_few_shot.DSPyFewShot()} if published and dspy_few_shot.installed() else {}
    return {PLAIN: lambda task, model, budget, seed: TextPrompt.for_task(task), FEW: few,
            SEARCH: functools.partial(random_search, shots=shots), **optimizers, **dspy}


def _has_answers(task: TextTask) -> bool:
    """Whether single answers are scored."""
    return task.labels is not None or isinstance(task.metric, str) or callable(task.metric)


class OwnEmbeddings(Predictor):
    """The embeddings that a language model gives the texts of a task without any prompt."""

    def __init__(self, task: TextTask, model: LanguageModel) -> None:
        self.task, self.model = task, model

    def predict(self, examples: Sequence[Example]) -> list[Any]:
        """A vector for each example."""
        return list(self.model.embed([self.task.show(e) for e in examples]))


def few_shot_baseline(task: TextTask, model: LanguageModel, budget: Budget, seed: int, *, shots: int) -> TextPrompt:
    """A few-shot prompt drawn by task and seed."""
    return few_shot(task, random.Random(f"{task.name}:{seed}"), shots)


def random_search(task: TextTask, model: LanguageModel, budget: Budget, seed: int, *, shots: int) -> TextPrompt:
    """The best of random few-shot prompts, by their scores on dev."""
    rng = random.Random(f"{task.name}:{seed}")
    candidate = best = few_shot(task, rng, shots)
    value, curve = -1.0, list[list[float]]()
    # each candidate is scored on a part of dev, so that a small budget still sees several
    part = list(task.dev)[:max(1, min(len(task.dev), (budget.calls or 0) // 8 or 1))]
    metered = budget.meter(model)
    while True:
        try:
            score = task.evaluate(candidate.on(metered), part).score
        except BudgetExhausted:
            break
        if score > value:
            best, value = candidate, score
        curve.append([budget.used["calls"], value])
        candidate = few_shot(task, rng, shots)
    best.info.update(fitness=value, evaluations=len(curve), stopped="budget: calls", history=curve)
    return best


def few_shot(task: TextTask, rng: random.Random, shots: int) -> TextPrompt:
    """A prompt with ``shots`` random training examples of each class (of all examples for generation), shuffled."""
    groups: dict[str, list[Example]] = {}
    for example in task.train:
        groups.setdefault("" if task.classes is None else str(example.target), []).append(example)
    chosen = [e for group in groups.values() for e in rng.sample(group, min(shots, len(group)))]
    rng.shuffle(chosen)
    return TextPrompt.for_task(task, exemplars=chosen)


# ------------------------------------------------------------------------------------------------- the report

def _about(model: Any) -> dict[str, Any]:
    """What makes a kept search one for this model."""
    own = getattr(model, "fingerprint", None)
    weights = own() if callable(own) else fingerprint(model) if hasattr(model, "state_dict") else None
    return {"model": getattr(model, "name", None) or type(model).__name__, "weights": weights}


def _shown(prompt: Any, example: Example) -> str | None:
    """The prompt around an example as text, where it is one."""
    render = getattr(prompt, "render", None)
    try:
        shown = None if render is None else render(example)
        return shown if shown is None or isinstance(shown, str) else "\n\n".join(map(str, shown))
    except (ValueError, TypeError, NotImplementedError):  # such as an ensemble of several texts
        return None


def _curve(info: Mapping[str, Any]) -> list[list[float]]:
    """(calls, best fitness) as the search went on, where the optimiser reports ``info["history"]``."""
    out = []
    for n, point in enumerate(info.get("history") or ()):
        if isinstance(point, Mapping):
            x, y = point.get("calls", n + 1), point.get("fitness", point.get("best"))
        elif isinstance(point, (list, tuple)) and len(point) == 2:
            x, y = point
        else:
            x, y = n + 1, point
        if isinstance(x, (int, float)) and isinstance(y, (int, float)):
            out.append([float(x), float(y)])
    return out


def _show(report: Report, runs: Sequence[tuple[Task, str, int, dict[str, Any]]], budgets: Sequence[int]) -> None:
    found = [(task.name, name, seed, cell) for task, name, seed, cell in runs]
    table = report.table("Prompts found", [
        "optimiser", "task", "seed", "budget", "dev", "test", "low", "high", "calls", "tokens", "seconds",
        "prompt tokens", "stopped"], note=(
            "dev, test: the task's metric; interval: bootstrap over examples, or over halves of them for metrics of "
            "the whole set; tokens: of the search; prompt tokens: those around the example; plain and few-shot prompts "
            "need no search"))
    for task, name, seed, cell in found:
        searched = name not in (PLAIN, FEW, OWN)
        table.add(name, task, seed, cell["budget"] if searched else None, cell["dev"], cell["test"],
                  *cell["interval"][1:], cell["calls"], cell["tokens"], cell["seconds"] if searched else None,
                  cell["length"], cell["stopped"])
    if len(budgets) > 1:
        _growth(report, found)
    found = [f for f in found if f[3]["budget"] == budgets[-1]]
    names = list(dict.fromkeys(n for _, n, _, _ in found))
    tasks = list(dict.fromkeys(t for t, _, _, _ in found))
    summary = report.table("Test score over seeds", ["optimiser", "task", "seeds", "test", "low", "high",
                                                     "against few-shot", "low ", "high "], note=(
        "intervals: bootstrap over seeds and examples together, over seeds for metrics of the whole set; against "
        "few-shot: difference on the same examples"))
    for task in tasks:
        few = {s: c["scores"] for t, n, s, c in found if t == task and n == FEW}
        for name in names:
            cells = {s: c for t, n, s, c in found if t == task and n == name}
            if not cells:
                continue
            paired = [a - b for s, c in cells.items() if s in few for a, b in zip(c["scores"], few[s], strict=True)]
            [one, *more] = cells.values()
            summary.add(name, task, len(cells), *(bootstrap(_pooled([one, *more])) if more else one["interval"]),
                        *(bootstrap(paired) if paired else (None, None, None)))
        curves = [(n, s, c["curve"]) for t, n, s, c in found if t == task and c["curve"]]
        if curves:
            report.figure(f"Learning curves, {task}", x_label="calls", y_label="best fitness so far (own scale)",
                          note="fitness is each method's own: compare shapes, and values only within a method",
                          series=[Series(n if len({x for _, x, _ in curves}) == 1 else f"{n}, seed {s}",
                                         [p[0] for p in curve], [p[1] for p in curve], style="line")
                                  for n, s, curve in curves])
    with_length = [(n, c) for _, n, _, c in found if c["length"] is not None]
    report.figure("Cost and gain", x_label="prompt tokens", y_label="test score", series=[
        Series(name, [c["length"] for n, c in with_length if n == name],
               [c["test"] for n, c in with_length if n == name], style="points") for name in names])
    for task, name, seed, cell in found:
        if name not in (PLAIN, FEW, OWN) and cell["prompt"] is not None:
            report.examples.append((f"{name} on {task}, seed {seed}: the prompt around the first test example",
                                    cell["prompt"]))


def _pooled(cells: Sequence[dict[str, Any]]) -> list[float]:
    """Scores of all examples of all seeds; the scores of the seeds where examples have none."""
    return [score for cell in cells for score in cell["scores"] or [cell["test"]]]


def _growth(report: Report, found: Sequence[tuple[str, str, int, dict[str, Any]]]) -> None:
    """Test score as the budget grows, one figure for each task."""
    for task in dict.fromkeys(t for t, _, _, _ in found):
        figure = report.figure(f"Test score by budget, {task}", x_label="budget, calls", y_label="test score",
                               x_log=True, note="interval: bootstrap over seeds and examples together")
        for name in dict.fromkeys(n for t, n, _, _ in found if t == task and n not in (PLAIN, FEW, OWN)):
            cells: dict[int, list[dict[str, Any]]] = {}
            for t, n, _, cell in found:
                if (t, n) == (task, name):
                    cells.setdefault(cell["budget"], []).append(cell)
            points = [bootstrap(_pooled(c)) for _, c in sorted(cells.items())]
            figure.series.append(Series(name, [float(b) for b in sorted(cells)], [p.value for p in points],
                                        [p.low for p in points], [p.high for p in points]))
