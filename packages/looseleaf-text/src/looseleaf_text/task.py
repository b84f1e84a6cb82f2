"""Tasks: examples, what is asked about them, and how an answer is marked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from looseleaf.errors import did_you_mean

if TYPE_CHECKING:
    from looseleaf_text.model import LanguageModel
    from looseleaf_text.prompt import Prompt

Metric = Callable[[str, "Example"], float]
"""What a metric is: (prediction, example) -> a mark, higher is better."""

_SLOT = re.compile(r"\{([A-Za-z_]\w*)\}")


@dataclasses.dataclass(frozen=True)
class Example:
    """One input and what should come out.

    Attributes:
        text: the input: a string (the field ``text``), or several named strings.
        label: the right class, for a classification task.
        reference: the right answer, for a generation task.
    """

    text: str | dict[str, str]
    label: str | None = None
    reference: str | None = None

    @property
    def fields(self) -> dict[str, str]:
        """The input as field name -> text."""
        return {"text": self.text} if isinstance(self.text, str) else dict(self.text)

    def to_dict(self) -> dict[str, Any]:
        """The example as plain data, without what is not set."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Example:
        """The inverse of :meth:`to_dict`."""
        return cls(data["text"], data.get("label"), data.get("reference"))


def slots(template: str) -> list[str]:
    """The names in braces of ``template``, in order, each once: ``"{a} and {b}"`` has ``["a", "b"]``."""
    return list(dict.fromkeys(_SLOT.findall(template)))


def fill(template: str, fields: Mapping[str, str]) -> str:
    """``template`` with each ``{name}`` of ``fields`` replaced; other braces stay as they are.

    Not ``str.format``: prompts hold JSON and code, and values that hold braces must not be filled again.
    """
    return _SLOT.sub(lambda match: fields.get(match.group(1), match.group(0)), template)


def with_prefix(shown: str, answer_prefix: str) -> str:
    """``shown`` and then ``answer_prefix``, on a new line unless white space of its own stands between them."""
    between = "\n" if answer_prefix and not answer_prefix[0].isspace() and not shown[-1:].isspace() else ""
    return shown + between + answer_prefix


def exact_match(prediction: str, example: Example) -> float:
    """1.0 where prediction and reference are the same text but for case and outer white space."""
    return float(prediction.strip().casefold() == (example.reference or "").strip().casefold())


def contains(prediction: str, example: Example) -> float:
    """1.0 where the reference stands somewhere in the prediction, case ignored."""
    return float((example.reference or "").strip().casefold() in prediction.casefold())


METRICS: dict[str, Metric] = {"exact_match": exact_match, "contains": contains}
"""Metrics of generation tasks by name; classification tasks have ``"accuracy"``."""


@dataclasses.dataclass
class Evaluation:
    """What came out of marking a prompt.

    Attributes:
        score: mean mark; for classification the share of right answers.
        marks: mark of each example.
        predictions: predicted label or generated text of each example.
        log_probs: classification: log-probability of each label (in the order of ``task.labels``) per example.
    """

    score: float
    marks: list[float]
    predictions: list[str]
    log_probs: list[list[float]] | None = None


@dataclasses.dataclass
class Task:
    """Examples, how they are shown to a model, and how its answer is marked.

    Attributes:
        name: short name, such as ``"sentiment"``.
        train: examples a method may use as it likes (demonstrations, fitness).
        dev: examples a method may use to choose among its candidates; may be empty.
        test: examples for the final figure. No method reads them.
        labels: classification: label -> verbalizer, the text that stands for it after the prompt (a leading
            space usually belongs to it); None for a generation task.
        metric: ``"accuracy"`` (classification), ``"exact_match"``, ``"contains"`` or a callable
            ``(prediction, example) -> float`` (generation).
        template: how an example is shown, with slots ``{text}`` or ``{field}``.
        answer_prefix: what follows the template and comes before the answer, such as ``"Sentiment:"``; on a new
            line, unless it begins with white space of its own.
        max_tokens: generation: longest answer in tokens.
        stop: generation: texts that end the answer.
    """

    name: str
    train: Sequence[Example]
    dev: Sequence[Example] = ()
    test: Sequence[Example] = ()
    labels: dict[str, str] | None = None
    metric: str | Metric = "accuracy"
    template: str = "{text}"
    answer_prefix: str = ""
    max_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)

    @property
    def is_classification(self) -> bool:
        """Whether the answer is one of :attr:`labels`."""
        return self.labels is not None

    def validate(self, model: LanguageModel | None = None) -> None:
        """Raise ValueError for a task no method can work with; warn where examples leak into the test.

        Args:
            model: also checks that every verbalizer has tokens under this model's tokenizer.

        Raises:
            ValueError: no training examples; fewer than two labels; training examples of one class only; an
                example whose label is not in ``labels`` or that lacks a field of the template or a reference;
                empty or equal verbalizers; a metric that does not fit.
        """
        if not self.train:
            raise ValueError(f"task {self.name!r} has no training examples: give at least one (two classes for "
                             "classification)")
        if self.labels is not None:
            self._validate_labels(self.labels, model)
        elif self.metric == "accuracy" or (isinstance(self.metric, str) and self.metric not in METRICS):
            raise ValueError(f"task {self.name!r} has metric={self.metric!r} and no labels: allowed for generation "
                             f"are {', '.join(map(repr, METRICS))} or a callable (prediction, example) -> float; "
                             "for classification give labels={'label': ' verbalizer', ...}")
        wanted = slots(self.template)
        if not wanted:
            raise ValueError(f"task {self.name!r} has template={self.template!r} without a slot: "
                             "write {text} or {field} where the example goes")
        for part, examples in (("train", self.train), ("dev", self.dev)):
            for n, example in enumerate(examples):
                self._validate_example(f"task {self.name!r}, {part}[{n}]", example, wanted)
        shown = {self.show(e) for e in self.train} | {self.show(e) for e in self.dev}
        leaked = sum(self.show(e) in shown for e in self.test)
        if leaked:
            warnings.warn(f"task {self.name!r}: {leaked} of {len(self.test)} test examples are also in train or dev; "
                          "figures on the test will be too high", UserWarning, stacklevel=2)

    def _validate_labels(self, labels: dict[str, str], model: LanguageModel | None) -> None:
        if len(labels) < 2:
            raise ValueError(f"task {self.name!r} has {len(labels)} label(s) {list(labels)}: classification needs "
                             "at least two; for generation give labels=None")
        if self.metric != "accuracy":
            raise ValueError(f"task {self.name!r} has labels and metric={self.metric!r}: allowed is 'accuracy'")
        for label, verbalizer in labels.items():
            empty = not verbalizer.strip() or (model is not None and _has_no_tokens(model, verbalizer))
            if empty:
                raise ValueError(f"task {self.name!r}: label {label!r} has verbalizer {verbalizer!r}, which has no "
                                 "tokens: give each label a text of its own, such as ' positive'")
        for verbalizer, count in Counter(labels.values()).items():
            if count > 1:
                same = [label for label, text in labels.items() if text == verbalizer]
                raise ValueError(f"task {self.name!r}: labels {same} share the verbalizer {verbalizer!r}; "
                                 "the model could not tell them apart")
        present = {e.label for e in self.train}
        if len(present) < 2:
            raise ValueError(f"task {self.name!r}: all training examples have the label {present.pop()!r}; "
                             "give examples of at least two classes")

    def _validate_example(self, where: str, example: Example, wanted: list[str]) -> None:
        if self.labels is not None and example.label not in self.labels:
            raise ValueError(f"{where} has label {example.label!r}, allowed are {list(self.labels)}."
                             + did_you_mean(str(example.label), self.labels))
        if self.labels is None and example.reference is None and isinstance(self.metric, str):
            raise ValueError(f"{where} has no reference, which metric {self.metric!r} needs")
        missing = [name for name in wanted if name not in example.fields]
        if missing:
            raise ValueError(f"{where} lacks {missing} of the template {self.template!r}; "
                             f"it has {sorted(example.fields)}")

    def show(self, example: Example) -> str:
        """The example through the template, without the answer."""
        return fill(self.template, example.fields)

    def answer(self, example: Example) -> str:
        """The right answer as it stands in a demonstration."""
        if self.labels is not None:
            return self.labels[str(example.label)]
        return f" {example.reference}" if self.answer_prefix and not self.answer_prefix[-1:].isspace() else str(
            example.reference)

    def demonstration(self, example: Example) -> str:
        """The example with its answer, as one piece of a few-shot prompt."""
        return with_prefix(self.show(example), self.answer_prefix) + self.answer(example)

    def split(self, seed: int) -> tuple[list[Example], list[Example]]:
        """The training examples in two halves, each class shared evenly, for methods that need a held-out part.

        Args:
            seed: decides who goes where; the same seed gives the same halves.
        """
        rng = random.Random(seed)
        first: list[Example] = []
        second: list[Example] = []
        for label in sorted({str(e.label) for e in self.train}):
            mine = [e for e in self.train if str(e.label) == label]
            rng.shuffle(mine)
            # An odd one goes to the smaller half, so that both halves stay within one of each other.
            middle = len(mine) // 2 + (len(mine) % 2 if len(first) <= len(second) else 0)
            first += mine[:middle]
            second += mine[middle:]
        rng.shuffle(first)
        rng.shuffle(second)
        return first, second

    def log_probs(self, prompt: Prompt, model: LanguageModel, examples: Sequence[Example]) -> list[list[float]]:
        """Log-probability of every label after the rendered prompt: one row per example, order of ``labels``.

        Where ``prompt.info`` has a ``calibration``, one offset per label, it is subtracted. Where the prompt has a
        verbalizer of its own, that maps answers to labels; where it has members, these are combined.

        Raises:
            ValueError: the task has no labels, or the prompt's verbalizer has others.
        """
        from looseleaf_text.answers import label_log_probs

        if self.labels is None:
            raise ValueError(f"task {self.name!r} has no labels; use evaluate()")
        return label_log_probs(prompt, model, self.labels, examples)

    def evaluate(self, prompt: Prompt, model: LanguageModel, examples: Sequence[Example] | None = None) -> Evaluation:
        """Mark ``prompt`` on ``examples`` (None: the test examples).

        One call per example (and member of an ensemble) is counted by the model.

        Raises:
            ValueError: there are no examples.
        """
        examples = self.test if examples is None else examples
        if not len(examples):
            raise ValueError(f"task {self.name!r}: no examples to evaluate on")
        if self.labels is not None:
            rows = self.log_probs(prompt, model, examples)
            names = list(self.labels)
            predictions = [names[max(range(len(row)), key=row.__getitem__)] for row in rows]
            marks = [float(p == e.label) for p, e in zip(predictions, examples, strict=True)]
            return Evaluation(sum(marks) / len(marks), marks, predictions, rows)
        predictions = self.predict(prompt, model, examples)
        marks = [self.mark(p, e) for p, e in zip(predictions, examples, strict=True)]
        return Evaluation(sum(marks) / len(marks), marks, predictions)

    def predict(self, prompt: Prompt, model: LanguageModel, examples: Sequence[Example]) -> list[str]:
        """The text generated for each example; of an ensemble the one that its members say most."""
        from looseleaf_text.answers import generate, most_voted

        if prompt.members:
            said = [self.predict(m, model, examples) for m in prompt.members]
            return [most_voted(texts, prompt.weights) for texts in zip(*said, strict=True)]
        return generate(prompt, model, examples, self.max_tokens, list(self.stop) or None)

    def mark(self, prediction: str, example: Example) -> float:
        """The mark of one answer by the task's metric (a label's name for classification)."""
        if self.labels is not None:
            return float(prediction == example.label)
        metric = METRICS[self.metric] if isinstance(self.metric, str) else self.metric
        return float(metric(prediction, example))

    def fingerprint(self) -> str:
        """A short hash of everything a method may see; test examples are not read."""
        metric = self.metric if isinstance(self.metric, str) else getattr(self.metric, "__qualname__", "metric")
        seen = [self.name, [e.to_dict() for e in self.train], [e.to_dict() for e in self.dev], self.labels, metric,
                self.template, self.answer_prefix, self.max_tokens, list(self.stop)]
        return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]


def _has_no_tokens(model: LanguageModel, text: str) -> bool:
    from looseleaf.errors import EndpointError

    try:
        return not model.tokenize(text)
    except EndpointError:  # a server without a tokenizer: nothing to check against
        return False
