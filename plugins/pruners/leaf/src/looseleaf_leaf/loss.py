"""The distillation loss."""

from __future__ import annotations

import torch
from torch import Tensor

from looseleaf_leaf.batch import IGNORED
from looseleaf_leaf.gradients import at_least_float32


def response_kl(teacher: Tensor, student: Tensor, labels: Tensor, *, temperature: float = 1.0,
                count: Tensor | int | None = None) -> Tensor:
    """KL(teacher || student) over the positions that predict the response, nats a token.

    Args:
        teacher, student: logits (B, L, V); no gradient goes to the teacher's.
        labels: (B, L), -100 outside the response; the logits at i predict the label at i + 1.
        temperature: both distributions are softened by it, and the loss is multiplied by its square, so that gradients
            keep their size.
        count: divide the sum over positions by this; None: by the number of positions (their mean).

    Returns:
        A scalar, float32 (float64 for float64 logits).

    Raises:
        ValueError: vocabularies of different size.
    """
    if teacher.shape != student.shape:
        raise ValueError(f"the teacher's logits have shape {tuple(teacher.shape)}, the student's {tuple(student.shape)}"
                         ": distillation compares distributions over one vocabulary. Where only the padding of the "
                         "embeddings differs, say vocabulary=len(tokenizer)")
    at = labels[:, 1:] != IGNORED
    log_teacher = torch.log_softmax(at_least_float32(teacher[:, :-1][at].detach()) / temperature, -1)
    log_student = torch.log_softmax(at_least_float32(student[:, :-1][at]) / temperature, -1)
    # a probability of zero times a log of minus infinity is zero: nothing of that token is to be learned
    terms = torch.where(log_teacher.isneginf(), 0.0, log_teacher.exp() * (log_teacher - log_student))
    total = terms.sum() * temperature ** 2
    return total / (at.sum().clamp(min=1) if count is None else count)
