"""Answer mapping: which answers of a model stand for which label."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from looseleaf.prompts.prompt import storable
from looseleaf_text.model import has_tokens

if TYPE_CHECKING:
    from looseleaf_text.model import LanguageModel

Aggregation = Literal["sum", "mean", "max"]


@storable
@dataclasses.dataclass(frozen=True)
class Verbalizer:
    """Label -> one or several answers, each of one or several tokens.

    The answer space Z is all answers of all labels. Probabilities are first normalised over Z, then those of a
    label's answers are aggregated; with ``"sum"`` the labels' probabilities sum to one as they are, with ``"mean"``
    and ``"max"`` they are normalised again.

    Attributes:
        answers: label -> its answers; a leading space usually belongs to them.
        aggregation: how the probabilities of a label's answers become one.

    Raises:
        ValueError: fewer than two labels, a label without answers, an empty answer, an answer of two labels.
    """

    answers: Mapping[str, Sequence[str]]
    aggregation: Aggregation = "sum"

    def __post_init__(self) -> None:
        if self.aggregation not in ("sum", "mean", "max"):
            raise ValueError(f"Verbalizer.aggregation: expected 'sum', 'mean' or 'max', got {self.aggregation!r}")
        if len(self.answers) < 2:
            raise ValueError(f"Verbalizer.answers: expected two labels or more, got {list(self.answers)}")
        owner: dict[str, str] = {}
        for label, answers in self.answers.items():
            if isinstance(answers, str) or not answers:
                raise ValueError(f"label {label!r}: expected a list of one answer or more, got {answers!r} "
                                 "(Verbalizer.of takes single texts too)")
            for answer in answers:
                if not answer.strip():
                    raise ValueError(f"label {label!r} has the answer {answer!r}, which has no tokens: give a text")
                if answer in owner:
                    raise ValueError(f"the answer {answer!r} stands for {owner[answer]!r} and for {label!r}: "
                                     "the model could not tell them apart" if owner[answer] != label else
                                     f"label {label!r} has the answer {answer!r} twice")
                owner[answer] = label
        object.__setattr__(self, "answers", {label: tuple(a) for label, a in self.answers.items()})

    @classmethod
    def of(cls, answers: Mapping[str, str | Sequence[str]], aggregation: Aggregation = "sum") -> Verbalizer:
        """A verbalizer from label -> answer or answers."""
        return cls({k: (v,) if isinstance(v, str) else tuple(v) for k, v in answers.items()}, aggregation)

    @property
    def labels(self) -> list[str]:
        """The labels, in order."""
        return list(self.answers)

    @property
    def space(self) -> list[str]:
        """The answer space Z: all answers, those of the first label first."""
        return [answer for answers in self.answers.values() for answer in answers]

    def label_of(self, answer: str) -> str:
        """The answer mapping z -> y.

        Raises:
            ValueError: ``answer`` is not in the answer space.
        """
        for label, answers in self.answers.items():
            if answer in answers:
                return label
        raise ValueError(f"{answer!r} is not in the answer space {self.space}")

    def map(self, change: Callable[[Sequence[str]], Sequence[str]]) -> Verbalizer:
        """The verbalizer with the answers of each label changed."""
        return Verbalizer({label: tuple(change(answers)) for label, answers in self.answers.items()},
                          self.aggregation)

    def validate(self, model: LanguageModel) -> None:
        """Raise ValueError for an answer without tokens under this model's tokenizer."""
        for label, answers in self.answers.items():
            for answer in answers:
                if not has_tokens(model, answer):
                    raise ValueError(f"label {label!r} has the answer {answer!r}, which has no tokens under the "
                                     f"tokenizer of {model.name}: give another text")

    def log_probs(self, scores: Sequence[Sequence[float]]) -> list[list[float]]:
        """Log-probabilities of labels from those of answers.

        Args:
            scores: (examples, answers) natural-log probabilities in the order of :attr:`space`; normalised or not.

        Returns:
            (examples, labels); each row's probabilities sum to one.
        """
        return [log_normalised(self._aggregate(log_normalised(row))) for row in scores]

    def _aggregate(self, row: Sequence[float]) -> list[float]:
        if len(row) != len(self.space):
            raise ValueError(f"expected one score for each of the answers {self.space}, got {len(row)}")
        out, at = [], 0
        for answers in self.answers.values():
            own = row[at:at + len(answers)]
            at += len(answers)
            if self.aggregation == "max":
                out.append(max(own))
            else:
                out.append(log_sum(own) - (math.log(len(own)) if self.aggregation == "mean" else 0.0))
        return out


def log_sum(row: Sequence[float]) -> float:
    """Log of the sum of the exponentials, without overflow."""
    top = max(row)
    return top if math.isinf(top) else top + math.log(sum(math.exp(v - top) for v in row))


def log_normalised(row: Sequence[float]) -> list[float]:
    """Log-probabilities less the log of their sum, so that the probabilities sum to one."""
    total = log_sum(row)
    return [-math.log(len(row))] * len(row) if math.isinf(total) else [v - total for v in row]
