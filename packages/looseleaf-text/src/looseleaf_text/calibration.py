"""Contextual calibration (Zhao et al. 2021): the bias of a prompt on content-free inputs is removed.

A prompt leans towards some labels whatever the input. How far is read off inputs without content; dividing by these
probabilities makes the model neutral on them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from looseleaf.prompts.prompt import Prompt
from looseleaf.tasks import Example, Predictor, as_rows
from looseleaf_text.ensemble import EnsemblePrompt
from looseleaf_text.verbalizer import log_normalised, log_sum

if TYPE_CHECKING:
    from looseleaf_text.model import LanguageModel
    from looseleaf_text.task import TextTask

CONTENT_FREE = ("N/A", "[MASK]", "")
"""Inputs without content, as in Zhao et al. 2021, section 5."""


def content_free(names: Iterable[str], inputs: Sequence[str] = CONTENT_FREE) -> list[Example]:
    """Examples without content: each of ``inputs`` under every name.

    Raises:
        ValueError: no inputs.
    """
    if isinstance(inputs, str) or not inputs:
        raise ValueError(f"inputs: expected a list of one text or more, got {inputs!r}")
    names = list(names)
    return [Example({name: text for name in names}) for text in inputs]


def offsets(rows: Sequence[Sequence[float]]) -> list[float]:
    """What to subtract from the log-probability of each label.

    Args:
        rows: (content-free inputs, labels) natural-log probabilities.

    Returns:
        Log of the mean probability of each label, each input's normalised first; one for each label.
    """
    columns = zip(*(log_normalised(row) for row in rows), strict=True)
    return [log_sum(column) - math.log(len(column)) for column in columns]


def subtract(rows: Sequence[Sequence[float]], offsets: Sequence[float]) -> list[list[float]]:
    """``rows`` (examples, labels) less the offset of each label."""
    return [[value - offset for value, offset in zip(row, offsets, strict=True)] for row in rows]


@dataclasses.dataclass
class CalibratedPrompt(Prompt):
    """A prompt with classes whose scores are made neutral on inputs without content; see :func:`calibrate`.

    Attributes:
        prompt: any prompt with classes.
        offsets: what is subtracted from the score of each class, in the order of the prompt's own classes.
    """

    prompt: Prompt
    offsets: Sequence[float]

    def on(self, model: Any) -> CalibratedPredictor:
        """See :meth:`looseleaf.Prompt.on`."""
        return CalibratedPredictor(self, model)

    def render(self, example: Example) -> str:
        """As the prompt inside."""
        inner: Any = self.prompt
        text: str = inner.render(example)
        return text


class CalibratedPredictor(Predictor):
    """A :class:`CalibratedPrompt` and a model."""

    def __init__(self, prompt: CalibratedPrompt, model: Any) -> None:
        self.inner, self.offsets = prompt.prompt.on(model), list(prompt.offsets)
        self.classes = self.inner.classes
        if len(self.offsets) != len(self.classes or ()):
            raise ValueError(f"CalibratedPrompt.offsets: expected one for each of the classes {self.classes}, got "
                             f"{self.offsets}")

    def scores(self, examples: Sequence[Example]) -> list[list[float]]:
        """The scores of the prompt inside, less the offset of each class."""
        return subtract(as_rows(self.inner.scores(examples)), self.offsets)


def calibrate(prompt: Prompt, task: TextTask, model: LanguageModel, inputs: Sequence[str] = CONTENT_FREE) -> Prompt:
    """``prompt`` calibrated on ``inputs`` under every name of the task's inputs; one call for each.

    The members of an ensemble are calibrated each by itself, and a calibrated prompt is calibrated anew.

    Raises:
        ValueError: the task has no labels, or there are no inputs.
    """
    if task.labels is None:
        raise ValueError(f"task {task.name!r}: expected labels, without which nothing can be calibrated, got none")
    if isinstance(prompt, EnsemblePrompt):
        return dataclasses.replace(prompt, members=[calibrate(m, task, model, inputs) for m in prompt.members])
    plain = prompt.prompt if isinstance(prompt, CalibratedPrompt) else prompt
    rows = as_rows(plain.on(model).scores(content_free(task.train[0].inputs, inputs)))
    return CalibratedPrompt(plain, offsets(rows), info=dict(prompt.info))
