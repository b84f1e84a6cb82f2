"""Few-shot tasks of pictures, new classes and other domains, and what they are measured by."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from looseleaf.files import read_text
from looseleaf.statistics import expected_calibration_error
from looseleaf.tasks import Evaluation, Example, Task


class LazyExamples(Sequence[Example]):
    """Examples that are made when they are asked for, so that a set of any size takes no memory.

    Args:
        make: place -> the example.
        total: how many there are.
    """

    def __init__(self, make: Callable[[int], Example], total: int) -> None:
        self.make, self.total = make, total

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self.make(n) for n in range(*place.indices(self.total))]
        if not -self.total <= place < self.total:
            raise IndexError(place)
        return self.make(place % self.total)

    def __iter__(self) -> Iterator[Example]:
        return (self.make(n) for n in range(self.total))


def few_shot(labels: Sequence[Any], shots: int, seed: int, validation: int = 0) -> tuple[list[int], list[int]]:
    """Places of ``shots`` random examples of each class, and of ``validation`` others; smaller classes give all.

    The classes' draws do not depend on one another, so that a part of the classes has the same examples.

    Args:
        labels: the class of every example.
        shots: of each class.
        seed: of the draw.
        validation: of each class, from those left over.

    Raises:
        ValueError: shots below 1.
    """
    if shots < 1:
        raise ValueError(f"shots: expected an integer >= 1, got {shots}")
    groups: dict[Any, list[int]] = {}
    for place, label in enumerate(labels):
        groups.setdefault(label, []).append(place)
    train: list[int] = []
    rest: list[int] = []
    for label, places in groups.items():
        drawn = random.Random(f"{seed} {label}").sample(places, len(places))
        train += drawn[:shots]
        rest += drawn[shots:shots + validation]
    return sorted(train), sorted(rest)


def few_shot_task(name: str, train: Sequence[Example], test: Sequence[Example], *, shots: int, seed: int,
                  dev: Sequence[Example] | None = None, classes: Sequence[Any] | None = None) -> Task:
    """A task with ``shots`` examples of each class to learn from, and min(shots, 4) to choose by, as CoOp has them.

    Args:
        name: of the task.
        train: what shots are drawn from; read whole.
        test: for the final figure.
        shots: of each class; a smaller class gives all.
        seed: of the draw.
        dev: what the examples to choose by are drawn from; None: from what is left of ``train``.
        classes: in their order; None: the targets of ``train``, sorted.
    """
    train = list(train)
    few, rest = few_shot([e.target for e in train], shots, seed, min(shots, 4) if dev is None else 0)
    chosen = [train[n] for n in rest]
    if dev is not None:
        dev = list(dev)
        chosen = [dev[n] for n in few_shot([e.target for e in dev], min(shots, 4), seed)[0]]
    names = sorted({e.target for e in train}) if classes is None else list(classes)
    return Task(name, [train[n] for n in few], chosen, test, classes=names)


def from_arrays(images: Sequence[Any], labels: Sequence[Any], shots: int, seed: int, *, name: str,
                classes: Sequence[Any] | None = None, test: int = 40, least: int = 12) -> Task:
    """A few-shot task from pictures and their labels, with the same test examples for every seed and number of shots.

    Of each class half, but at most ``test``, is for the test; shots and examples to choose by are drawn from the rest.

    Args:
        images: such as uint8 (n, H, W, 3 or 4).
        labels: as many.
        shots: of each class; a smaller class gives all.
        seed: of the draw of the shots.
        name: of the task.
        classes: those to be told apart, in their order; None: all with ``least`` pictures or more, sorted.
        test: most test examples of a class.
        least: smallest class.

    Raises:
        ValueError: not as many labels as pictures, or fewer than two classes.
    """
    if len(images) != len(labels):
        raise ValueError(f"from_arrays: expected as many labels as pictures, got {len(labels)} and {len(images)}")
    groups: dict[Any, list[int]] = {}
    for place, label in enumerate(labels):
        groups.setdefault(label, []).append(place)
    names = list(classes) if classes is not None else sorted(n for n, group in groups.items() if len(group) >= least)
    if len(names) < 2 or any(n not in groups for n in names):
        raise ValueError(f"from_arrays: expected two classes or more of {least} pictures and more, got {names}")
    held: list[int] = []
    rest: list[int] = []
    for label in names:
        drawn = random.Random(f"test {label}").sample(groups[label], len(groups[label]))
        cut = min(test, len(drawn) // 2)
        held, rest = held + drawn[:cut], rest + drawn[cut:]

    def example(place: int) -> Example:
        return Example({"image": np.array(images[place])}, labels[place])

    train, dev = few_shot([labels[n] for n in rest], shots, seed, min(shots, 4))
    return Task(name, [example(rest[n]) for n in train], [example(rest[n]) for n in dev], [example(n) for n in held],
                classes=names)


def from_torchvision(dataset: Any, shots: int, seed: int, *, test: Any = None, name: str | None = None) -> Task:
    """A few-shot task from any dataset with ``classes``, such as those of torchvision.

    Args:
        dataset: gives ``(picture, number of the class)``; without a transform, so that the model's own preprocessing
            sees the picture. Labels are taken from its ``targets``, ``labels`` or ``_labels`` where it has them, and
            read one by one elsewhere.
        shots: of each class.
        seed: of the draw.
        test: the dataset of the test part, read lazily; None: what is left of ``dataset``.
        name: of the task; None: the dataset's class.

    Raises:
        ValueError: the dataset has no ``classes``.
    """
    classes = getattr(dataset, "classes", None)
    if classes is None:
        raise ValueError(f"from_torchvision: expected a dataset with `classes`, got {type(dataset).__name__}: set the "
                         "attribute to the names in the order of the labels")
    names = [str(c[0] if isinstance(c, (tuple, list)) else c) for c in classes]  # ImageNet has synonyms
    labels = _labels(dataset)
    train, dev = few_shot(labels, shots, seed, min(shots, 4))

    def example(source: Any, place: int) -> Example:
        picture, label = source[place]
        return Example({"image": picture}, names[int(label)])

    if test is None:
        rest = sorted(set(range(len(labels))) - {*train, *dev})
        left = LazyExamples(lambda n: example(dataset, rest[n]), len(rest))
    else:
        left = LazyExamples(lambda n: example(test, n), len(test))
    return Task(name or type(dataset).__name__, [example(dataset, n) for n in train],
                [example(dataset, n) for n in dev], left, classes=names)


def read_split(path: str | Path, pictures: str | Path, shots: int, seed: int, *, name: str | None = None) -> Task:
    """A few-shot task from a ``split_zhou_*.json`` of CoOp: train, val and test as ``[file, label, class]``.

    Args:
        path: the file.
        pictures: the folder that its file names are relative to.
        shots: of each class.
        seed: of the draw.
        name: of the task; None: from the file's name.

    Raises:
        ValueError: the file is no such split.
    """
    folder = Path(pictures)
    try:
        split = json.loads(read_text(path))
        parts = {part: [(str(file), int(label), str(cls)) for file, label, cls in split[part]]
                 for part in ("train", "val", "test")}
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a split with the lists train, val and test of [file, label, class], got "
                         f"{type(error).__name__}: {error}") from error
    names = {label: cls for rows in parts.values() for _, label, cls in rows}
    classes = [names[label] for label in sorted(names)]

    def lazily(rows: Sequence[tuple[str, int, str]]) -> LazyExamples:
        return LazyExamples(lambda n: Example({"image": _opened(folder / rows[n][0])}, rows[n][2]), len(rows))

    train = [parts["train"][n] for n in few_shot([row[1] for row in parts["train"]], shots, seed)[0]]
    dev = [parts["val"][n] for n in few_shot([row[1] for row in parts["val"]], min(shots, 4), seed)[0]]
    return Task(name or Path(path).stem.removeprefix("split_zhou_"), list(lazily(train)), list(lazily(dev)),
                lazily(parts["test"]), classes=classes)


@dataclasses.dataclass
class BaseToNew:
    """A task divided by classes: learn on the first half, measure on both.

    Attributes:
        base: the task of the first half of the classes.
        new: that of the others; its training examples are for nobody but a method that says so.
        whole: the test examples of both among all names, learned from the base classes.
    """

    base: Task
    new: Task
    whole: Task

    def evaluate(self, prompt: Any, model: Any) -> dict[str, float]:
        """``base``, ``new`` (each among its own names), their ``harmonic`` mean, and ``whole`` among all names.

        Args:
            prompt: one with ``for_classes``, such as :class:`VisionPrompt`.
            model: what it is put on.
        """
        scores = {part: task.evaluate(prompt.for_classes(task.classes).on(model)).score
                  for part, task in (("base", self.base), ("new", self.new), ("whole", self.whole))}
        return {**scores, "harmonic": harmonic_mean(scores["base"], scores["new"])}


def base_to_new(task: Task) -> BaseToNew:
    """``task`` divided as CoCoOp does: of the classes in their order the first ceil(n / 2) are base.

    Raises:
        ValueError: fewer than three classes.
    """
    classes = list(task.classes or ())
    if len(classes) < 3:
        raise ValueError(f"base_to_new: expected a task of three classes or more, got {len(classes)}")
    half = math.ceil(len(classes) / 2)

    def part(name: str, own: Sequence[Any]) -> Task:
        keep = set(own)
        train, dev, test = ([e for e in examples if e.target in keep] for examples in (task.train, task.dev, task.test))
        return dataclasses.replace(task, name=f"{task.name}, {name}", train=train, dev=dev, test=test,
                                   classes=list(own))

    base, new = part("base", classes[:half]), part("new", classes[half:])
    whole = dataclasses.replace(task, name=f"{task.name}, all", train=base.train, dev=base.dev, classes=classes,
                                test=[*base.test, *new.test])
    return BaseToNew(base, new, whole)


def cross_domain(prompt: Any, model: Any, tasks: Sequence[Task]) -> dict[str, Evaluation]:
    """What a prompt that was learned on one task is worth on others, with their own names; by name of the task.

    Args:
        prompt: one with ``for_classes``, such as :class:`VisionPrompt`.
        model: what it is put on.
        tasks: other data, or the same classes in another style.
    """
    return {task.name: task.evaluate(prompt.for_classes(task.classes).on(model)) for task in tasks}


def harmonic_mean(base: float, new: float) -> float:
    """2 * base * new / (base + new); 0 where both are."""
    return 2 * base * new / (base + new) if base + new else 0.0


def calibration_error(evaluation: Evaluation, examples: Sequence[Example], classes: Sequence[Any],
                      bins: int = 15) -> float:
    """Expected calibration error of the whole set, from the softmax of the class scores, in [0, 1].

    Args:
        evaluation: of a predictor with scores.
        examples: those it was made on.
        classes: of the task, the order of the scores.
        bins: of equal width.

    Raises:
        ValueError: the evaluation has no class scores.
    """
    if evaluation.class_scores is None:
        raise ValueError("calibration_error: expected an evaluation with class scores, got one without: the predictor "
                         "needs scores()")
    scores = np.array(evaluation.class_scores)
    odds = np.exp(scores - scores.max(1, keepdims=True))
    best = odds.argmax(1)
    names = list(classes)
    right = [float(names[b] == e.target) for b, e in zip(best.tolist(), examples, strict=True)]
    return expected_calibration_error((odds.max(1) / odds.sum(1)).clip(0, 1).tolist(), right, bins)


def scores_by_class(evaluation: Evaluation, examples: Sequence[Example]) -> Mapping[Any, float]:
    """Mean score of the examples of each target."""
    groups: dict[Any, list[float]] = {}
    for example, score in zip(examples, evaluation.scores or (), strict=True):
        groups.setdefault(example.target, []).append(score)
    return {target: sum(scores) / len(scores) for target, scores in groups.items()}


def _labels(dataset: Any) -> list[int]:
    for name in ("targets", "labels", "_labels"):
        found = getattr(dataset, name, None)
        if found is not None and len(found) == len(dataset):
            return [int(label) for label in found]
    return [int(dataset[n][1]) for n in range(len(dataset))]


def _opened(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGBA" if "transparency" in image.info or image.mode == "RGBA" else "RGB")


__all__ = ["BaseToNew", "LazyExamples", "base_to_new", "calibration_error", "cross_domain", "few_shot",
           "few_shot_task", "from_arrays", "from_torchvision", "harmonic_mean", "read_split", "scores_by_class"]
