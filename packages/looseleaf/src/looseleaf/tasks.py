"""Tasks: examples of any kind, what is predicted about them, and how predictions are scored."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

from looseleaf.errors import did_you_mean
from looseleaf.fingerprint import content_fingerprint

Metric = Callable[[Any, "Example"], float]
"""A metric of single predictions: (prediction, example) -> a score, higher is better."""


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """Inputs by name, and what should come out.

    Two examples are equal where all of their content is, tensors and pictures included.

    Attributes:
        inputs: name -> text, picture, graph, layout, number, ...: ``{"text": "a fine film"}``.
        target: the right class or answer, of any type; None: unknown.
    """

    inputs: Mapping[str, Any]
    target: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Mapping):
            inputs = f'"text": {self.inputs[:40]!r}' if isinstance(self.inputs, str) else '"picture": ...'
            raise TypeError(f"Example.inputs: expected inputs by name, got {type(self.inputs).__name__}: write "
                            f"Example({{{inputs}}}, target)")
        object.__setattr__(self, "inputs", dict(self.inputs))

    @functools.cached_property
    def _content(self) -> str:
        return content_fingerprint([self.inputs, self.target])

    def fingerprint(self) -> str:
        """A short hash of inputs and target."""
        return self._content

    def __eq__(self, other: object) -> bool:
        return self._content == other._content if isinstance(other, Example) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._content)


class Predictor:
    """Something that predicts: a prompt and a model together, or a baseline without either.

    One that knows the classes sets :attr:`classes` and gives :meth:`scores`, or overrides :meth:`predict` where it
    has no scores; one of a task without classes overrides :meth:`predict`.

    Attributes:
        classes: the classes, in the order of the columns of :meth:`scores`; None: it predicts something else.
    """

    classes: Sequence[Any] | None = None

    def predict(self, examples: Sequence[Example]) -> list[Any]:
        """What is predicted for each example; here the class of the highest score, the first of equals."""
        if self.classes is None:
            raise NotImplementedError(f"{type(self).__name__}: expected classes and scores(), or predict()")
        return _best(self.classes, as_rows(self.scores(examples)))

    def scores(self, examples: Sequence[Example]) -> Any:
        """(examples, classes) scores, higher is likelier, such as natural-log probabilities (need not be normalised).

        Returns:
            Lists of numbers, an array or a tensor.
        """
        raise NotImplementedError(f"{type(self).__name__} has no scores of classes")


@dataclasses.dataclass(frozen=True)
class SetMetric:
    """A metric of a whole set that is no mean over examples: mean average precision, a rank correlation.

    Attributes:
        function: (predictions, examples) -> a score, higher is better.
    """

    function: Callable[[list[Any], list[Example]], float]


class ScoreMetric(SetMetric):
    """One of the scores of classes, ((examples, classes) as lists, examples) -> a score: AUROC, likelihood."""


def accuracy(prediction: Any, example: Example) -> float:
    """1.0 where the prediction is the target."""
    return float(prediction == example.target)


@dataclasses.dataclass
class Evaluation:
    """What predictions are worth.

    Attributes:
        score: by the task's metric; the mean of :attr:`scores` where there are any.
        scores: of each example; None for a metric of the whole set.
        predictions: the predicted class, text, ... of each example.
        class_scores: (examples, classes) in the order of ``task.classes``; None without classes or scores.
    """

    score: float
    scores: list[float] | None
    predictions: list[Any]
    class_scores: list[list[float]] | None = None


@dataclasses.dataclass
class Task:
    """Examples, and how predictions about them are scored. What makes the predictions is no part of it.

    Class attributes:
        metrics: metrics by name; ``"accuracy"`` is for tasks with classes, all others for tasks without.

    Attributes:
        name: short name, such as ``"sentiment"``.
        train: examples a method may use as it likes (demonstrations, fitness, gradients).
        dev: examples a method may use to choose among its candidates; may be empty.
        test: examples for the final figure. No method reads them.
        classes: classification: what targets can be, two or more; None: targets are anything else.
        metric: a name of :attr:`metrics`, a function ``(prediction, example) -> float``, a :class:`SetMetric` or a
            :class:`ScoreMetric`; higher is better.
    """

    metrics: ClassVar[Mapping[str, Metric]] = {"accuracy": accuracy}

    name: str
    train: Sequence[Example]
    dev: Sequence[Example] = ()
    test: Sequence[Example] = ()
    classes: Sequence[Any] | None = None
    metric: str | Metric | SetMetric = "accuracy"

    def validate(self) -> None:
        """Raise ValueError for a task no method can work with; warn where test examples are in train or dev, too.

        Test examples are looked at where they are in a list or tuple; other sequences may read from disk.

        Raises:
            ValueError: no training examples; fewer than two classes, or training examples of one class only; a
                target that is no class or that the metric misses; a metric that does not fit.
        """
        where, metric = f"task {self.name!r}", self.metric
        if not len(self.train):
            raise ValueError(f"{where}: expected training examples, got none: give one or more (of two classes for "
                             "classification)")
        if self.classes is not None and (len(self.classes) < 2 or len(set(self.classes)) < len(self.classes)):
            raise ValueError(f"{where}: expected two different classes or more, got {list(self.classes)}: give "
                             "classes=None where the target is something else")
        if isinstance(metric, str) and metric not in self.metrics:
            raise ValueError(f"{where}: expected a metric {', '.join(map(repr, self.metrics))}, a function, a "
                             f"SetMetric or a ScoreMetric, got {metric!r}.{did_you_mean(metric, self.metrics)}")
        if (isinstance(metric, str) and (metric == "accuracy") != (self.classes is not None)) or (
                isinstance(metric, ScoreMetric) and self.classes is None):
            raise ValueError(f"{where}: expected metric='accuracy' or a ScoreMetric with classes and another metric "
                             f"without, got metric={metric!r} and classes={self.classes!r}")
        for part, examples in (("train", self.train), ("dev", self.dev)):
            for n, example in enumerate(examples):
                self.validate_example(f"{where}, {part}[{n}]", example)
        if self.classes is not None and len({repr(e.target) for e in self.train}) < 2:
            raise ValueError(f"{where}: expected training examples of two classes or more, got only "
                             f"{self.train[0].target!r}")
        if isinstance(self.test, (list, tuple)) and self.test:
            seen = {self.key(e) for examples in (self.train, self.dev) for e in examples}
            leaked = sum(self.key(e) in seen for e in self.test)
            if leaked:
                warnings.warn(f"{where}: {leaked} of {len(self.test)} test examples are also in train or dev; figures "
                              "on the test will be too high", UserWarning, stacklevel=3)

    def validate_example(self, where: str, example: Example) -> None:
        """Raise ValueError that begins with ``where`` unless a method can work with ``example``."""
        if not isinstance(example, Example):
            raise ValueError(f"{where}: expected a looseleaf.Example, got {type(example).__name__}")
        if self.classes is not None and example.target not in list(self.classes):
            raise ValueError(f"{where}: expected a target among {list(self.classes)}, got {example.target!r}."
                             + did_you_mean(str(example.target), map(str, self.classes)))
        if isinstance(self.metric, str) and example.target is None:
            raise ValueError(f"{where}: expected a target, which metric {self.metric!r} needs, got None")

    def key(self, example: Example) -> Hashable:
        """What two examples share that ask the same: here a hash of the inputs."""
        return content_fingerprint(example.inputs)

    def fingerprint(self) -> str:
        """A short hash of everything a method may see; test examples are not read."""
        return content_fingerprint({f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                                    if f.name != "test"})

    def part(self, split: str | Sequence[Example]) -> Sequence[Example]:
        """The examples of ``"train"``, ``"dev"`` or ``"test"``, or those given; ValueError for another name."""
        parts = {"train": self.train, "dev": self.dev, "test": self.test}
        if isinstance(split, str) and split not in parts:
            raise ValueError(f"split: expected 'train', 'dev', 'test' or a list of examples, got {split!r}")
        return parts[split] if isinstance(split, str) else split

    def class_scores(self, predictor: Predictor, examples: Sequence[Example]) -> list[list[float]]:
        """What ``predictor.scores`` gives, checked, with the columns in the order of :attr:`classes`.

        Raises:
            ValueError: the task has no classes, the predictor has others, or its scores are not one number for each.
        """
        columns = self._columns(predictor)
        rows, name = as_rows(predictor.scores(examples)), type(predictor).__name__
        if len(rows) != len(examples) or any(len(row) != len(columns) for row in rows):
            raise ValueError(f"{name}.scores: expected ({len(examples)}, {len(columns)}) numbers, "
                             f"got ({len(rows)}, {len(rows[0]) if rows else 0})")
        for n, row in enumerate(rows):
            if any(map(math.isnan, row)):
                raise ValueError(f"{name}.scores: expected numbers, got {row} for example {n}")
        return [[row[c] for c in columns] for row in rows]

    def _columns(self, predictor: Predictor) -> list[int]:
        """Where the predictor has each class of the task."""
        if self.classes is None:
            raise ValueError(f"task {self.name!r}: expected a task with classes, got one without: use evaluate()")
        theirs = None if predictor.classes is None else list(predictor.classes)
        if theirs is None or set(theirs) != set(self.classes):
            raise ValueError(f"task {self.name!r}: expected a predictor of exactly the classes {list(self.classes)}, "
                             f"got one of {theirs}: make the prompt for this task, or give it these classes")
        return [theirs.index(c) for c in self.classes]

    def score(self, prediction: Any, example: Example) -> float:
        """The score of one prediction by the task's metric; ValueError where that is one of the whole set."""
        if isinstance(self.metric, SetMetric):
            raise ValueError(f"task {self.name!r}: expected a metric of single predictions, got a "
                             f"{type(self.metric).__name__}: use evaluate()")
        metric = self.metrics[self.metric] if isinstance(self.metric, str) else self.metric
        return float(metric(prediction, example))

    def evaluate(self, predictor: Predictor, split: str | Sequence[Example] = "test") -> Evaluation:
        """Score ``predictor`` on ``"train"``, ``"dev"``, ``"test"`` or a list of examples.

        Raises:
            ValueError: no examples, a predictor of other classes, or not one prediction for each example.
        """
        examples = self.part(split)
        if not len(examples):
            raise ValueError(f"task {self.name!r}: expected examples to evaluate on, got none")
        if self.classes is not None:
            self._columns(predictor)
            if type(predictor).scores is not Predictor.scores:
                rows = self.class_scores(predictor, examples)
                return self.rate(_best(self.classes, rows), examples, rows)
        return self.rate(predictor.predict(examples), examples)

    def rate(self, predictions: Sequence[Any], examples: Sequence[Example],
             class_scores: list[list[float]] | None = None) -> Evaluation:
        """Score predictions that are there already; see :meth:`evaluate`."""
        predictions = list(predictions)
        if len(predictions) != len(examples):
            raise ValueError(f"task {self.name!r}: expected a prediction for each of {len(examples)} examples, got "
                             f"{len(predictions)}")
        if isinstance(self.metric, SetMetric):
            read = class_scores if isinstance(self.metric, ScoreMetric) else predictions
            if read is None:
                raise ValueError(f"task {self.name!r}: expected a predictor with scores, which its metric reads")
            return Evaluation(float(self.metric.function(read, list(examples))), None, predictions, class_scores)
        scores = [self.score(p, e) for p, e in zip(predictions, examples, strict=True)]
        return Evaluation(sum(scores) / len(scores), scores, predictions, class_scores)


def as_rows(scores: Any) -> list[list[float]]:
    """(examples, classes) scores as lists of numbers, from lists, an array or a tensor."""
    rows = scores.tolist() if hasattr(scores, "tolist") else scores
    return [[float(v) for v in row] for row in rows]


def _best(classes: Sequence[Any], rows: list[list[float]]) -> list[Any]:
    """The class of the highest score in each row, the first of equals."""
    return [classes[row.index(max(row))] for row in rows]


__all__ = ["Evaluation", "Example", "Metric", "Predictor", "ScoreMetric", "SetMetric", "Task", "as_rows"]
