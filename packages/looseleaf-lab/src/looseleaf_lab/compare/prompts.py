"""Prompt optimisers under equal budgets, against plain and few-shot prompts and random search."""

from __future__ import annotations

import functools
import os
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looseleaf import Budget, BudgetExhausted, PromptOptimizer, Report, Series
from looseleaf_text import Prompt
from looseleaf import progress as progress_
from looseleaf.statistics import bootstrap
from looseleaf_lab import metrics
from looseleaf_lab.compare import common, dspy_few_shot
from looseleaf.resume import Cells, digest

if TYPE_CHECKING:
    from looseleaf_text import LanguageModel, Task

PLAIN, FEW, SEARCH = "(plain)", "(few-shot)", "(random search)"


def compare_prompts(model: LanguageModel, optimizers: Mapping[str, PromptOptimizer], tasks: Sequence[Task], *,
                    calls: int | Sequence[int] = 2000, seeds: Sequence[int] = (0,), shots: int = 2,
                    published: bool = True, state: str | os.PathLike[str] | None = None,
                    progress: bool | None = None) -> Report:
    """Accuracy on dev and test, and the cost, of every optimiser on every task, all with the same budget of calls.

    Three rivals are always there: the task's plain prompt, ``shots`` random exemplars of each class, and the best of
    as many random sets of exemplars as the budget allows; DSPy's few-shot optimiser too where DSPy is installed.

    Args:
        model: what the prompts are for.
        optimizers: name -> optimiser.
        tasks: with dev and test examples.
        calls: budget of each search in model calls; several give the accuracy as the budget grows, each from the
            start. Tables of summaries are for the largest.
        seeds: each search is run once with each.
        shots: exemplars of each class in the few-shot rivals.
        published: run DSPy's optimiser where it is installed.
        state: folder for finished and for interrupted searches; the same call resumes.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: no task, a task without dev or test, or calls below 1.
    """
    budgets = [calls] if isinstance(calls, int) else sorted(calls)
    if not tasks or not budgets or budgets[0] < 1 or not seeds:
        raise ValueError(f"{len(tasks)} tasks, calls={calls}, {len(seeds)} seeds: allowed is one of each or more")
    for task in tasks:
        task.validate(model)
        if not task.dev or not task.test:
            raise ValueError(f"task {task.name!r} needs dev and test examples to be compared on")
    cells, failed, weights = Cells(state), dict[str, str](), model.fingerprint()
    found: list[tuple[str, str, int, dict[str, Any]]] = []
    searches: dict[str, Any] = dict(optimizers)
    if published and dspy_few_shot.installed():
        searches[dspy_few_shot.NAME] = dspy_few_shot.DSPyFewShot()
    jobs = [(t, n, s, b) for t in tasks for n in (PLAIN, FEW, SEARCH, *searches) for s in seeds
            for b in (budgets[-1:] if n in (PLAIN, FEW) else budgets)]
    for task, name, seed, most in progress_.track(jobs, "searches", show=progress):
        key = {"what": "prompt", "task": task.name, "optimizer": name, "seed": seed, "calls": most, "shots": shots,
               "model": model.name, "weights": weights,
               "examples": task.fingerprint(), "test": digest([str(e) for e in task.test]),
               "parameters": common.identity(searches[name]) if name in searches else None}
        folder = None if state is None else Path(state) / "searches" / digest(key)
        try:
            work = functools.partial(measure, task, name, searches.get(name), model, most, seed, shots, folder,
                                     progress)
            found.append((task.name, name, seed, cells.do(key, work)))
        except Exception as error:
            failed[f"{name} on {task.name}, seed {seed}"] = common.reason(error)
    report = Report("Prompt optimisers side by side", common.facts(
        model=model.name, tasks=", ".join(t.name for t in tasks), calls=", ".join(map(str, budgets)),
        seeds=", ".join(map(str, seeds))))
    _show(report, found, budgets)
    common.left_out(report, failed)
    return report


def measure(task: Task, name: str, optimizer: Any, model: LanguageModel, calls: int, seed: int,
            shots: int = 2, state: Path | None = None, progress: bool | None = None) -> dict[str, Any]:
    """One search, and what its prompt is worth: marks on dev and test, cost, length, curve and the prompt itself."""
    budget = Budget(calls=calls)
    start = time.perf_counter()
    tokens_before = model.tokens
    if optimizer is not None:
        prompt = optimizer.optimize(task, model, budget, seed=seed, state_dir=state, progress=progress)
    else:
        prompt = rival(name, task, model, budget, seed, shots)
    seconds = time.perf_counter() - start
    used, tokens = budget.used, model.tokens - tokens_before
    dev = task.evaluate(prompt, model, list(task.dev))
    test = task.evaluate(prompt, model, list(task.test))
    shown = task.test[0]
    return {
        "budget": calls, "dev": dev.score, "test": test.score, "marks": test.marks, "seconds": seconds,
        # a search that was resumed has spent more than this process saw
        "calls": int(used["calls"]), "tokens": max(int(used["tokens"]), tokens),
        "length": model.count_tokens(prompt.render(shown)) - model.count_tokens(task.show(shown)),
        "stopped": str(prompt.info.get("stopped", "done")), "curve": _curve(prompt.info),
        "prompt": prompt.render(shown)}


def rival(name: str, task: Task, model: LanguageModel, budget: Budget, seed: int, shots: int) -> Prompt:
    """The plain prompt, a few-shot one, or the best of random few-shot ones on dev."""
    if name == PLAIN:
        return Prompt.for_task(task)
    rng = random.Random(f"{task.name}:{seed}")
    best, value, curve = few_shot(task, rng, shots), -1.0, []
    if name == FEW:
        return best
    # each candidate is marked on a part of dev, so that a small budget still sees several
    part = list(task.dev)[:max(1, min(len(task.dev), (budget.calls or 0) // 8 or 1))]
    candidate = best
    while True:
        try:
            budget.spend(calls=len(part))
        except BudgetExhausted:
            break
        score = task.evaluate(candidate, model, part).score
        if score > value:
            best, value = candidate, score
        curve.append([budget.used["calls"], value])
        candidate = few_shot(task, rng, shots)
    best.info.update(fitness=value, evaluations=len(curve), stopped="budget: calls", history=curve)
    return best


def few_shot(task: Task, rng: random.Random, shots: int) -> Prompt:
    """A prompt with ``shots`` random training examples of each class (of all examples for generation), shuffled."""
    groups: dict[str, list[Any]] = {}
    for example in task.train:
        groups.setdefault(str(example.label), []).append(example)
    chosen = [e for group in groups.values() for e in rng.sample(group, min(shots, len(group)))]
    rng.shuffle(chosen)
    return Prompt.for_task(task, exemplars=chosen)


def _curve(info: Mapping[str, Any]) -> list[list[float]]:
    """(calls, best fitness) as the search went on, where the optimiser says so in ``info["history"]``."""
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


def _show(report: Report, found: Sequence[tuple[str, str, int, dict[str, Any]]], budgets: Sequence[int]) -> None:
    table = report.table("Prompts found", [
        "optimiser", "task", "seed", "budget", "dev", "test", "from", "to", "calls", "tokens", "seconds",
        "prompt tokens", "stopped"], note=(
            "test: interval by bootstrap over examples; tokens: of the search; prompt tokens: those around the "
            "example; plain and few-shot prompts need no search"))
    for task, name, seed, cell in found:
        _, low, high = bootstrap(cell["marks"], seed)
        table.add(name, task, seed, None if name in (PLAIN, FEW) else cell["budget"], cell["dev"], cell["test"], low,
                  high, cell["calls"], cell["tokens"],
                  None if name in (PLAIN, FEW) else cell["seconds"], cell["length"], cell["stopped"])
    if len(budgets) > 1:
        _growth(report, found)
    found = [f for f in found if f[3]["budget"] == budgets[-1]]
    names = list(dict.fromkeys(n for _, n, _, _ in found))
    tasks = list(dict.fromkeys(t for t, _, _, _ in found))
    summary = report.table("Test accuracy over seeds", ["optimiser", "task", "seeds", "test", "from", "to",
                                                        "against few-shot", "from ", "to "], note=(
        "intervals: bootstrap over seeds and examples together; against few-shot: difference on the same examples"))
    for task in tasks:
        few = {s: c["marks"] for t, n, s, c in found if t == task and n == FEW}
        for name in names:
            cells = {s: c["marks"] for t, n, s, c in found if t == task and n == name}
            if not cells:
                continue
            marks = [m for row in cells.values() for m in row]
            paired = [a - b for s in cells if s in few for a, b in zip(cells[s], few[s], strict=True)]
            summary.add(name, task, len(cells), *bootstrap(marks),
                        *(bootstrap(paired) if paired else (None, None, None)))
        curves = [(n, s, c["curve"]) for t, n, s, c in found if t == task and c["curve"]]
        if curves:
            report.figure(f"Learning curves, {task}", x_label="calls", y_label="best fitness so far (own scale)",
                          note="fitness is each method's own: compare shapes, and values only within a method",
                          series=[Series(n if len({x for _, x, _ in curves}) == 1 else f"{n}, seed {s}",
                                         [p[0] for p in curve], [p[1] for p in curve], style="line")
                                  for n, s, curve in curves])
    report.figure("Cost and gain", x_label="prompt tokens", y_label="test accuracy", series=[
        Series(name, [c["length"] for _, n, _, c in found if n == name],
               [c["test"] for _, n, _, c in found if n == name], style="points") for name in names])
    for task, name, seed, cell in found:
        if name not in (PLAIN, FEW):
            report.examples.append((f"{name} on {task}, seed {seed}: the prompt around the first test example",
                                    cell["prompt"]))


def _growth(report: Report, found: Sequence[tuple[str, str, int, dict[str, Any]]]) -> None:
    """Test accuracy as the budget grows, one figure for each task."""
    for task in dict.fromkeys(t for t, _, _, _ in found):
        figure = report.figure(f"Test accuracy by budget, {task}", x_label="budget, calls", y_label="test accuracy",
                               x_log=True, note="interval: bootstrap over seeds and examples together")
        for name in dict.fromkeys(n for t, n, _, _ in found if t == task and n not in (PLAIN, FEW)):
            marks: dict[int, list[float]] = {}
            for t, n, _, cell in found:
                if (t, n) == (task, name):
                    marks.setdefault(cell["budget"], []).extend(cell["marks"])
            found_here = [bootstrap(m) for _, m in sorted(marks.items())]
            figure.series.append(Series(name, [float(b) for b in sorted(marks)], [p[0] for p in found_here],
                                        [p[1] for p in found_here], [p[2] for p in found_here]))
