"""Prompt optimisers for dual encoders side by side: few-shot accuracy, new classes, calibration and cost."""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from torch import Tensor

from looseleaf.budget import Budget
from looseleaf.errors import did_you_mean
from looseleaf.fingerprint import content_fingerprint
from looseleaf.plugin import In, Plugin
from looseleaf.progress import track
from looseleaf.prompts.optimizer import PromptOptimizer
from looseleaf.report import Report, Series
from looseleaf.resume import digest
from looseleaf.statistics import bootstrap
from looseleaf.tasks import Task
from looseleaf_lab import data, models
from looseleaf_lab.benches.bench import Bench, State, ready
from looseleaf_lab.facts import facts, identity, left_out, reason
from looseleaf_lab.results import ResultCache
from looseleaf_vision import (
    CoCoOp,
    CoOp,
    DualEncoder,
    KgCoOp,
    LinearProbe,
    MaPLe,
    TemplateEnsemble,
    ZeroShot,
    as_image,
    base_to_new,
    calibration_error,
    from_arrays,
    harmonic_mean,
    picture_of,
    spaced,
)

SETS = {"clip-art": "sublabel", "stamps": "sublabel", "emoji": "sublabel", "emoji-other-style": "sublabel",
        "mnist": "label"}
"""Name of a data set of the lab -> what its classes are; of finer classes in folders the last folder."""
LARGEST = 12
"""Most classes of a task: the largest."""
BASELINES: dict[str, Callable[[], PromptOptimizer]] = {
    "(zero-shot)": ZeroShot, "(template ensemble)": TemplateEnsemble, "(linear probe)": LinearProbe, "(CoOp)": CoOp,
    "(CoCoOp)": CoCoOp, "(KgCoOp)": KgCoOp, "(MaPLe)": MaPLe}
FIGURES = ("accuracy", "base", "new", "harmonic", "ece")
SHOWN = 8
"""Example pictures of each task."""


@dataclasses.dataclass
class PicturePrompts(Bench):
    """Prompt optimisers for CLIP and its kin on few-shot tasks, with new classes, against published baselines.

    Args:
        clip: short name of a model of the lab, folder or hub id of a dual encoder.
        pictures: data sets of the lab (mini-clip has seen clip-art and emoji in training, the others not), or
            module:function (shots, seed) -> Task for tasks of your own.
        shots: training pictures of each class.
        seeds: draws of the shots, each with its own training, from --seed on.
        crops: random crops in training, as the authors have them; without, whole pictures, whose features are
            computed once.
        epochs: of every method that has any; None: each method's own.
        baselines: measure the published baselines too.
    """

    clip: str = "mini-clip"
    pictures: tuple[str, ...] = ("clip-art",)
    shots: Annotated[int, In(">= 1")] = 4
    seeds: Annotated[int, In(">= 1")] = 5
    crops: bool = False
    epochs: Annotated[int | None, In(">= 1")] = None
    baselines: bool = True
    interface: ClassVar[type[Plugin]] = PromptOptimizer

    def validate(self) -> None:
        """See :class:`Bench`."""
        for name in self.pictures:
            if name not in SETS and ":" not in name:
                raise ValueError(f"PicturePrompts.pictures: expected {', '.join(SETS)} or module:function, got "
                                 f"{name!r}.{did_you_mean(name, SETS)}")
        self.check("pictures", len(self.pictures) > 0, "one data set or more")

    def suits(self, plugin: Any) -> str | None:
        """Why a plugin cannot be compared here, or None where it can: it must accept a dual encoder."""
        cls: Any = plugin if isinstance(plugin, type) else type(plugin)
        return super().suits(plugin) or (
            None if issubclass(DualEncoder, cls.accepts) else f"for a {cls.accepts.__name__}, not for dual encoders")

    def run(self, plugins: Mapping[str, Any], *, state: State = None, seed: int = 0,
            progress: bool | None = None) -> Report:
        """The comparison; see :func:`compare_picture_prompts`.

        Args:
            plugins: name -> class or instance.
            state: folder for what is finished; the same call resumes.
            seed: of the first draw.
            progress: show a progress bar; None: only on a terminal.
        """
        seeds = range(seed, seed + self.seeds)
        tasks = {name: {s: lab_task(name, self.shots, s) for s in seeds} for name in self.pictures}
        ours = self.clip in models.own()
        clip = DualEncoder(*models.load(self.clip)) if ours else DualEncoder.from_pretrained(self.clip)
        made, failed = ready({**(BASELINES if self.baselines else {}), **plugins})
        made = {name: self._set(method) for name, method in made.items()}
        report = compare_picture_prompts(clip, made, tasks, state=state, progress=progress)
        trained = "self-trained, " if ours else ""
        report.facts.update(model=f"{self.clip} ({trained}{clip.name})", shots=self.shots,
                            crops="random" if self.crops else "none: whole pictures")
        left_out(report, failed)
        return report

    def _set(self, method: Any) -> Any:
        """A method with the epochs and crops that were asked for, where it has such fields."""
        fields = {f.name for f in dataclasses.fields(method)}
        changes: dict[str, Any] = {}
        if "crop" in fields and not self.crops:
            changes["crop"] = None
        if "epochs" in fields and self.epochs is not None:
            changes["epochs"] = self.epochs
        return dataclasses.replace(method, **changes)


def compare_picture_prompts(clip: DualEncoder, methods: Mapping[str, PromptOptimizer],
                            tasks: Mapping[str, Mapping[int, Task]], *, state: State = None,
                            progress: bool | None = None) -> Report:
    """Every method on every task: learned from all classes, and from the first half of them.

    A method that fails is listed under "Left out" and does not stop the others.

    Args:
        clip: the model.
        methods: name -> prompt optimiser.
        tasks: name -> seed -> task with the shots of this seed and the same test examples.
        state: folder for what is finished and for interrupted searches; the same call resumes.
        progress: show a progress bar; None: only on a terminal.

    Returns:
        Accuracy (all classes), base and new accuracy with their harmonic mean, calibration error, learned numbers,
        calls and seconds, with 95 % bootstrap intervals over seeds; and example pictures.

    Raises:
        ValueError: no methods or no tasks.
    """
    if not methods or not tasks or not all(tasks.values()):
        raise ValueError(f"compare_picture_prompts: expected methods and tasks, got {len(methods)} and {len(tasks)}")
    weights, failed, kept = clip.fingerprint(), dict[str, str](), ResultCache(state)
    cells: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    jobs = [(t, m, s) for t in tasks for m in methods for s in tasks[t]]
    for task_name, name, seed in track(jobs, "searches", show=progress):
        task, method = tasks[task_name][seed], methods[name]
        key = {"what": "picture-prompt", "task": task_name, "method": name, "seed": seed, "weights": weights,
               "examples": task.fingerprint(), "test": content_fingerprint(list(task.test)),
               "plugin": identity(method)}
        folder = None if state is None else Path(state) / "searches" / digest(key)
        try:
            found = kept.do(key, lambda m=method, t=task, s=seed, f=folder: measure(  # type: ignore[misc]
                m, t, clip, s, f, progress))
            cells.setdefault((task_name, name), {})[seed] = found
        except Exception as error:  # one method that fails must not cost the others their figures
            failed[f"{name} on {task_name}, seed {seed}"] = reason(error)
    seeds = sorted({s for by_seed in tasks.values() for s in by_seed})
    report = Report("Prompts for pictures side by side", facts(
        model=clip.name, tasks=", ".join(tasks), seeds=", ".join(map(str, seeds))))
    for task_name, by_seed in tasks.items():
        _show(report, task_name, {m: cells[task_name, m] for m in methods if (task_name, m) in cells},
              by_seed[min(by_seed)])
    left_out(report, failed)
    return report


def measure(method: PromptOptimizer, task: Task, clip: DualEncoder, seed: int, state: Path | None = None,
            progress: bool | None = None) -> dict[str, Any]:
    """What one method is worth on one task, as plain data.

    Args:
        method: a prompt optimiser that accepts dual encoders.
        task: with three classes or more.
        clip: the model.
        seed: of the searches.
        state: where interrupted searches go on.
        progress: show a progress bar.
    """
    budget, began = Budget(), time.perf_counter()
    prompt: Any = method.optimize(task, clip, budget=budget, seed=seed, state_dir=state and state / "all",
                                  progress=progress)
    seconds = time.perf_counter() - began
    whole = task.evaluate(prompt.on(clip))
    parts = base_to_new(task)
    half: Any = method.optimize(parts.base, clip, seed=seed, state_dir=state and state / "base", progress=progress)
    base = parts.base.evaluate(half.on(clip)).score
    new = None
    if hasattr(half, "for_classes"):
        new = parts.new.evaluate(half.for_classes(parts.new.classes).on(clip)).score
    return {"accuracy": whole.score, "base": base, "new": new,
            "harmonic": None if new is None else harmonic_mean(base, new),
            "ece": calibration_error(whole, task.test, task.classes or ()) if whole.class_scores else None,
            "parameters": learned_numbers(prompt), "calls": int(budget.used["calls"]), "seconds": seconds,
            "predictions": [str(p) for p in whole.predictions]}


def learned_numbers(value: Any) -> int:
    """How many numbers a prompt holds in tensors."""
    if isinstance(value, Tensor):
        return value.numel()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return sum(learned_numbers(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "info")
    if isinstance(value, Mapping):
        return sum(map(learned_numbers, value.values()))
    return sum(map(learned_numbers, value)) if isinstance(value, (list, tuple)) else 0


def lab_task(name: str, shots: int, seed: int) -> Task:
    """A few-shot task of the largest classes of a data set of the lab, or what ``module:function`` makes."""
    if ":" in name:
        module, _, function = name.partition(":")
        made: Task = getattr(importlib.import_module(module), function)(shots, seed)
        return made
    pictures: Any = data.pictures(name)
    labels = pictures.column(SETS[name])
    words = [spaced(str(label).split("/")[-1]).replace("-", " ").replace("&", "and").lower() for label in labels]
    counts = Counter(word for word in words if word)
    classes = sorted(word for word, count in counts.most_common(LARGEST) if count >= max(20, 2 * shots))
    return from_arrays(pictures.images, words, shots, seed, name=name, classes=classes)


def _show(report: Report, name: str, cells: Mapping[str, Mapping[int, Mapping[str, Any]]], task: Task) -> None:
    table = report.table(f"Prompts on {name}", [
        "method", "seeds", "accuracy", "low", "high", "base", "low ", "high ", "new", " low", " high", "harmonic",
        " low ", " high ", "calibration error", "learned numbers", "calls", "seconds"], note=(
            f"{len(task.classes or ())} classes; accuracy: learned from all of them; base and new: learned from the "
            "first half, each half among its own names; harmonic: mean of base and new; calibration error: 15 bins, "
            "all classes; intervals: bootstrap over seeds; calls: pictures and texts through the model while learning"))
    points: dict[str, tuple[float, float]] = {}
    for method, by_seed in cells.items():
        row: list[Any] = [method, len(by_seed)]
        for figure in FIGURES:
            values = [cell[figure] for cell in by_seed.values() if cell[figure] is not None]
            if figure == "ece":
                row.append(sum(values) / len(values) if values else None)
            else:
                row += [*bootstrap(values)] if values else [None] * 3
        first = next(iter(by_seed.values()))
        mean = {f: sum(c[f] for c in by_seed.values()) / len(by_seed) for f in ("calls", "seconds")}
        table.add(*row, first["parameters"], round(mean["calls"]), mean["seconds"])
        if first["new"] is not None:
            points[method] = (row[5], row[8])
    report.figure(f"Base and new classes, {name}", x_label="accuracy on base classes", y_label="accuracy on new ones",
                  series=[Series(method, [x], [y], style="points") for method, (x, y) in points.items()])
    firsts = {m: by_seed[min(by_seed)]["predictions"] for m, by_seed in cells.items()}
    if not firsts:
        return
    tests = list(task.test)
    divided = sorted(range(len(tests)), key=lambda n: (-len({p[n] for p in firsts.values()}), n))[:SHOWN]
    captions = [f"{tests[n].target}; right: " + (", ".join(
        m for m, p in firsts.items() if p[n] == str(tests[n].target)) or "none") for n in divided]
    report.image(f"Pictures of {name} on which methods differ", [_thumbnail(tests[n]) for n in divided],
                 captions=captions)


def _thumbnail(example: Any) -> Any:
    import numpy as np

    image = as_image(picture_of(example))
    image.thumbnail((96, 96))
    return np.array(image)


__all__ = ["BASELINES", "SETS", "PicturePrompts", "compare_picture_prompts", "lab_task", "learned_numbers", "measure"]
