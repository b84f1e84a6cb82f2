"""Tasks: examples of any kind, what is predicted about them, and how predictions are scored."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
import random
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from looseleaf.errors import did_you_mean

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
            write = f'Example({{"text": {self.inputs[:40]!r}}}, target)' if isinstance(
                self.inputs, str) else 'Example({"picture": ...}, target)'
            raise TypeError(f"Example.inputs: expected inputs by name, got {type(self.inputs).__name__}: write {write}")
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
        return [self.classes[_argmax(row)] for row in as_rows(self.scores(examples))]

    def scores(self, examples: Sequence[Example]) -> Any:
        """The score of every class, higher is likelier, such as natural-log probabilities (need not be normalised).

        Returns:
            (examples, classes): lists of numbers, an array or a tensor.
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


def exact_match(prediction: str, example: Example) -> float:
    """1.0 where prediction and target are the same text but for case and outer white space."""
    return float(prediction.strip().casefold() == str(example.target).strip().casefold())


def contains(prediction: str, example: Example) -> float:
    """1.0 where the target stands somewhere in the prediction, case ignored."""
    return float(str(example.target).strip().casefold() in prediction.casefold())


METRICS: dict[str, Metric] = {"accuracy": accuracy, "exact_match": exact_match, "contains": contains}
"""Metrics by name; ``"accuracy"`` is for tasks with classes, the others for texts."""


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

    Attributes:
        name: short name, such as ``"sentiment"``.
        train: examples a method may use as it likes (demonstrations, fitness, gradients).
        dev: examples a method may use to choose among its candidates; may be empty.
        test: examples for the final figure. No method reads them.
        classes: classification: what targets can be, two or more; None: targets are anything else.
        metric: ``"accuracy"`` (with classes), ``"exact_match"``, ``"contains"`` (texts), a function
            ``(prediction, example) -> float``, a :class:`SetMetric` or a :class:`ScoreMetric`; higher is better.
    """

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
        if isinstance(metric, str) and metric not in METRICS:
            raise ValueError(f"{where}: expected a metric {', '.join(map(repr, METRICS))}, a function, a SetMetric or "
                             f"a ScoreMetric, got {metric!r}.{did_you_mean(metric, METRICS)}")
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
        if isinstance(self.test, (list, tuple)):
            seen = {self.key(e) for e in self.train} | {self.key(e) for e in self.dev} if self.test else set()
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

    def part(self, split: str | Sequence[Example]) -> Sequence[Example]:
        """The examples of ``"train"``, ``"dev"`` or ``"test"``, or those given.

        Raises:
            ValueError: another name.
        """
        if not isinstance(split, str):
            return split
        if split not in ("train", "dev", "test"):
            raise ValueError(f"split: expected 'train', 'dev', 'test' or a list of examples, got {split!r}")
        examples: Sequence[Example] = getattr(self, split)
        return examples

    def split(self, seed: int) -> tuple[list[Example], list[Example]]:
        """The training examples in two halves, each class divided evenly, for methods that need a held-out part.

        Args:
            seed: decides who goes where; the same seed gives the same halves.
        """
        rng = random.Random(seed)
        first: list[Example] = []
        second: list[Example] = []
        for _, group in sorted(self._groups(self.train).items(), key=lambda entry: str(entry[0])):
            rng.shuffle(group)
            # An odd one goes to the smaller half, so that both halves stay within one of each other.
            middle = len(group) // 2 + (len(group) % 2 if len(first) <= len(second) else 0)
            first += group[:middle]
            second += group[middle:]
        rng.shuffle(first)
        rng.shuffle(second)
        return first, second

    def in_turn(self, examples: Sequence[Example], most: int | None = None) -> list[Example]:
        """The first ``most`` examples (None: all), the classes taking turns in the order in which they appear."""
        groups = list(self._groups(examples).values())
        rounds = max(map(len, groups), default=0)
        return [group[n] for n in range(rounds) for group in groups if n < len(group)][:most]

    def first_of_each(self, examples: Sequence[Example], most: int) -> list[Example]:
        """The first ``most`` examples of each class, in the order given; without classes the first ``most``."""
        kept = {id(e) for group in self._groups(examples).values() for e in group[:most]}
        return [e for e in examples if id(e) in kept]

    def _groups(self, examples: Sequence[Example]) -> dict[Any, list[Example]]:
        groups: dict[Any, list[Example]] = {}
        for example in examples:
            groups.setdefault(None if self.classes is None else example.target, []).append(example)
        return groups

    def class_scores(self, predictor: Predictor, examples: Sequence[Example]) -> list[list[float]]:
        """What ``predictor.scores`` gives, checked, with the columns in the order of :attr:`classes`.

        Raises:
            ValueError: the task has no classes, the predictor has others, or its scores are not one number for each.
        """
        classes = list(self.classes or ())
        theirs = self._classes_of(predictor)
        rows = as_rows(predictor.scores(examples))
        if len(rows) != len(examples) or any(len(row) != len(classes) for row in rows):
            raise ValueError(f"{type(predictor).__name__}.scores: expected ({len(examples)}, {len(classes)}) numbers, "
                             f"got ({len(rows)}, {len(rows[0]) if rows else 0})")
        for n, row in enumerate(rows):
            if any(map(math.isnan, row)):
                raise ValueError(f"{type(predictor).__name__}.scores: expected numbers, got {row} for example {n}")
        places = [theirs.index(c) for c in classes]
        return rows if places == list(range(len(places))) else [[row[p] for p in places] for row in rows]

    def _classes_of(self, predictor: Predictor) -> list[Any]:
        if self.classes is None:
            raise ValueError(f"task {self.name!r}: expected a task with classes, got one without: use evaluate()")
        theirs = None if predictor.classes is None else list(predictor.classes)
        if theirs is None or set(theirs) != set(self.classes):
            raise ValueError(f"task {self.name!r}: expected a predictor of exactly the classes {list(self.classes)}, "
                             f"got one of {theirs}: make the prompt for this task, or give it these classes")
        return theirs

    def score(self, prediction: Any, example: Example) -> float:
        """The score of one prediction by the task's metric.

        Raises:
            ValueError: the metric is one of the whole set.
        """
        if isinstance(self.metric, SetMetric):
            raise ValueError(f"task {self.name!r}: expected a metric of single predictions, got a "
                             f"{type(self.metric).__name__}: use evaluate()")
        metric = METRICS[self.metric] if isinstance(self.metric, str) else self.metric
        return float(metric(prediction, example))

    def evaluate(self, predictor: Predictor, split: str | Sequence[Example] = "test") -> Evaluation:
        """Score ``predictor`` on ``"train"``, ``"dev"``, ``"test"`` or a list of examples.

        Raises:
            ValueError: no examples, a predictor of other classes, or not one prediction for each example.
        """
        examples = self.part(split)
        if not len(examples):
            raise ValueError(f"task {self.name!r}: expected examples to evaluate on, got none")
        rows = None
        if self.classes is not None and type(predictor).scores is not Predictor.scores:
            rows = self.class_scores(predictor, examples)
            predictions = [self.classes[_argmax(row)] for row in rows]
        else:
            if self.classes is not None:
                self._classes_of(predictor)
            predictions = list(predictor.predict(examples))
        return self.rate(predictions, examples, rows)

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

    def fingerprint(self) -> str:
        """A short hash of everything a method may see; test examples are not read."""
        return content_fingerprint({f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                                    if f.name != "test"})


def as_rows(scores: Any) -> list[list[float]]:
    """(examples, classes) scores as lists of numbers, from lists, an array or a tensor."""
    if hasattr(scores, "tolist"):
        scores = scores.tolist()
    return [row if isinstance(row, list) and all(type(v) is float for v in row) else [float(v) for v in row]
            for row in scores]


def _argmax(row: Sequence[float]) -> int:
    return max(range(len(row)), key=row.__getitem__)


def content_fingerprint(value: Any) -> str:
    """Sixteen hexadecimal digits that stand for the whole content of a value.

    Numbers, text, containers, dataclasses, tensors, arrays, PIL images, and objects with ``fingerprint()``,
    ``to_dict()`` or plain attributes; functions by their name.

    Raises:
        TypeError: an object that shows nothing of its content.
    """
    digest = hashlib.sha256()
    _feed(digest, value, ())
    return digest.hexdigest()[:16]


def _feed(digest: Any, value: Any, inside: tuple[int, ...]) -> None:
    kind, parts = ("cycle", ()) if id(value) in inside else _content_of(value)
    digest.update(f"<{kind}>".encode())
    for part in parts:
        if isinstance(part, bytes):
            digest.update(len(part).to_bytes(8, "little") + part)
        else:
            _feed(digest, part, (*inside, id(value)))
    digest.update(b"</>")


def _content_of(value: Any) -> tuple[str, Iterable[Any]]:
    """What a value is, and its content as bytes and further values."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return kind, [str(value).encode("utf-8", "surrogatepass")]
    if isinstance(value, (bytes, bytearray)):
        return "bytes", [bytes(value)]
    if isinstance(value, os.PathLike):
        return "path", [os.fspath(value)]
    if isinstance(value, functools.partial):
        return "partial", [value.func, value.args, value.keywords]
    if hasattr(value, "__qualname__"):  # functions, methods and classes
        return "name", [str(value.__module__), value.__qualname__]
    if callable(getattr(value, "fingerprint", None)):
        return kind, [value.fingerprint()]
    if hasattr(value, "detach") and hasattr(value, "layout"):
        import torch

        flat = value.detach().cpu().to_dense().contiguous().reshape(-1)
        return f"tensor {value.dtype} {tuple(value.shape)}", [flat.view(torch.uint8).numpy().tobytes()]
    if hasattr(value, "__array_interface__") and hasattr(value, "dtype"):
        content = value.tolist() if value.dtype.hasobject else value.tobytes()
        return f"array {value.dtype.str} {value.shape}", [content]
    if hasattr(value, "tobytes") and hasattr(value, "mode"):
        return f"image {value.mode} {value.size}", [value.tobytes(), value.getpalette()]
    if dataclasses.is_dataclass(value):
        return kind, [{f.name: getattr(value, f.name) for f in dataclasses.fields(value)}]
    if isinstance(value, Mapping):
        entries = sorted(((content_fingerprint(k), v) for k, v in value.items()), key=lambda entry: entry[0])
        return "mapping", [part for entry in entries for part in entry]
    if isinstance(value, (set, frozenset)):
        return "set", sorted(map(content_fingerprint, value))
    if isinstance(value, Sequence):
        return "sequence", value
    if callable(getattr(value, "to_dict", None)):
        return kind, [value.to_dict()]
    if hasattr(value, "__dict__"):
        return kind, [vars(value)]
    raise TypeError(f"content_fingerprint: expected a value whose content can be read, got {kind}: give its class a "
                    "method fingerprint() -> str")


__all__ = ["METRICS", "Evaluation", "Example", "Metric", "Predictor", "ScoreMetric", "SetMetric", "Task", "as_rows",
           "content_fingerprint"]
