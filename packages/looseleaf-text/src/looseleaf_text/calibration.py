"""Contextual calibration (Zhao et al. 2021): what a prompt says before it has seen anything is taken back.

A prompt leans towards some labels whatever the input. How far is read off inputs without content; dividing by these
probabilities makes the model neutral on them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from looseleaf_text.task import Example
from looseleaf_text.verbalizer import log_normalised, log_sum

if TYPE_CHECKING:
    from looseleaf_text.model import LanguageModel
    from looseleaf_text.prompt import Prompt
    from looseleaf_text.task import Task

CONTENT_FREE = ("N/A", "[MASK]", "")
"""Inputs without content, as in Zhao et al. 2021, section 5."""


def content_free(fields: Iterable[str], inputs: Sequence[str] = CONTENT_FREE) -> list[Example]:
    """Examples without content: each of ``inputs`` in every field.

    Raises:
        ValueError: no inputs.
    """
    if isinstance(inputs, str) or not inputs:
        raise ValueError(f"inputs={inputs!r}: allowed is a list of one text or more")
    names = list(fields)
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


def calibrate(prompt: Prompt, task: Task, model: LanguageModel, inputs: Sequence[str] = CONTENT_FREE) -> Prompt:
    """``prompt`` with the offsets in ``info["calibration"]``, which :meth:`looseleaf_text.Task.log_probs` heeds.

    The members of an ensemble are calibrated each by itself. One call per input (and member).

    Raises:
        ValueError: the task has no labels, or there are no inputs.
    """
    if task.labels is None:
        raise ValueError(f"task {task.name!r} has no labels: only classification can be calibrated")
    if prompt.members:
        return dataclasses.replace(prompt, members=[calibrate(m, task, model, inputs) for m in prompt.members])
    plain = dataclasses.replace(prompt, info={k: v for k, v in prompt.info.items() if k != "calibration"})
    rows = task.log_probs(plain, model, content_free(task.train[0].fields, inputs))
    return dataclasses.replace(prompt, info={**prompt.info, "calibration": offsets(rows)})
