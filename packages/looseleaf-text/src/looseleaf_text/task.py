"""Tasks of text: how examples are shown to a language model, and what stands for each label."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from looseleaf.tasks import Example, Metric, Task
from looseleaf_text.model import has_tokens
from looseleaf_text.slots import fill, slots, with_prefix

if TYPE_CHECKING:
    from looseleaf_text.model import LanguageModel


def exact_match(prediction: str, example: Example) -> float:
    """1.0 where prediction and target are the same text but for case and outer white space."""
    return float(prediction.strip().casefold() == str(example.target).strip().casefold())


def contains(prediction: str, example: Example) -> float:
    """1.0 where the target stands somewhere in the prediction, case ignored."""
    return float(str(example.target).strip().casefold() in prediction.casefold())


@dataclasses.dataclass
class TextTask(Task):
    """A :class:`looseleaf.Task` of texts, and the form in which a prompt shows them.

    Without labels :attr:`metric` is ``"exact_match"``, ``"contains"``, a function or a :class:`looseleaf.SetMetric`.

    Attributes:
        labels: classification: label -> verbalizer, the text that stands for it after the prompt (a leading
            space usually belongs to it); None for a generation task. Their names are the task's ``classes``.
        template: how an example is shown, with slots ``{text}`` or ``{name}`` of its inputs.
        answer_prefix: what follows the template and comes before the answer, such as ``"Sentiment:"``; on a new
            line, unless it begins with white space of its own.
        max_tokens: generation: longest answer in tokens.
        stop: generation: texts that end the answer.
    """

    metrics: ClassVar[Mapping[str, Metric]] = {**Task.metrics, "exact_match": exact_match, "contains": contains}

    classes: Sequence[Any] | None = dataclasses.field(init=False, default=None)
    labels: dict[str, str] | None = None
    template: str = "{text}"
    answer_prefix: str = ""
    max_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)

    def __post_init__(self) -> None:
        self.classes = None if self.labels is None else tuple(self.labels)

    def validate(self, model: LanguageModel | None = None) -> None:
        """See :meth:`looseleaf.Task.validate`.

        Args:
            model: also checks that every verbalizer has tokens under this model's tokenizer.

        Raises:
            ValueError: as there; or an example that lacks a name of the template, empty or equal verbalizers.
        """
        if not slots(self.template):
            raise ValueError(f"task {self.name!r}: expected a template with a slot such as {{text}} where the example "
                             f"goes, got {self.template!r}")
        for label, verbalizer in (self.labels or {}).items():
            if not verbalizer.strip() or (model is not None and not has_tokens(model, verbalizer)):
                raise ValueError(f"task {self.name!r}: label {label!r} has verbalizer {verbalizer!r}, which has no "
                                 "tokens: give each label a text of its own, such as ' positive'")
        for verbalizer, count in Counter((self.labels or {}).values()).items():
            if count > 1:
                same = [label for label, text in (self.labels or {}).items() if text == verbalizer]
                raise ValueError(f"task {self.name!r}: labels {same} share the verbalizer {verbalizer!r}; "
                                 "the model could not tell them apart")
        super().validate()

    def validate_example(self, where: str, example: Example) -> None:
        """See :meth:`looseleaf.Task.validate_example`; the template's names must be among the inputs."""
        super().validate_example(where, example)
        missing = [name for name in slots(self.template) if name not in example.inputs]
        if missing:
            raise ValueError(f"{where}: expected the inputs {slots(self.template)} of the template "
                             f"{self.template!r}, got {sorted(example.inputs)}")

    def key(self, example: Example) -> Hashable:
        """The example as it is shown."""
        return self.show(example)

    def show(self, example: Example) -> str:
        """The example through the template, without the answer."""
        return fill(self.template, example.inputs)

    def answer(self, example: Example) -> str:
        """The right answer as it stands in a demonstration."""
        if self.labels is not None:
            return self.labels[str(example.target)]
        return f" {example.target}" if self.answer_prefix and not self.answer_prefix[-1:].isspace() else str(
            example.target)

    def demonstration(self, example: Example) -> str:
        """The example with its answer, as one piece of a few-shot prompt."""
        return with_prefix(self.show(example), self.answer_prefix) + self.answer(example)

    def split(self, seed: int) -> tuple[list[Example], list[Example]]:
        """The training examples in two halves, each class divided evenly, for methods that need a held-out part."""
        rng = random.Random(seed)
        first: list[Example] = []
        second: list[Example] = []
        for _, group in sorted(self._groups(self.train).items(), key=lambda entry: str(entry[0])):
            rng.shuffle(group)
            # An odd one goes to the smaller half, so that both halves stay within one of each other.
            middle = (len(group) + (len(first) <= len(second))) // 2
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
