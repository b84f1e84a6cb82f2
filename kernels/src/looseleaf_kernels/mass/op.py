"""Selection by cumulative mass: choice of implementation, registration with ``torch.library``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from looseleaf_kernels.operations import ANYWHERE, Operation, register
from looseleaf_kernels.shapes import AnyMask, AnyScores

OPERATION = register(Operation("top_mass", __package__, {"reference": ANYWHERE, "cpu": ANYWHERE}))


@torch.library.custom_op(OPERATION.operator, mutates_args=())
def _forward(scores: Tensor, mass: Tensor, impl: str) -> Tensor:
    keep: Tensor = OPERATION.module(impl).top_mass(scores, mass)
    return keep


@_forward.register_fake
def _fake(scores: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def top_mass(scores: AnyScores, mass: float | Tensor) -> AnyMask:
    """The smallest set of largest scores of each row whose sum reaches a fraction of the row's total.

    Args:
        scores: (..., n), not negative.
        mass: fraction in (0, 1], a number or (...,). 1 takes every positive score. Ties go to the lower index.

    Returns:
        (..., n) bool; a row that is all zero selects nothing.
    """
    fraction = torch.as_tensor(mass, dtype=torch.float32, device=scores.device)
    keep: Tensor = _forward(scores, fraction.expand(scores.shape[:-1]).contiguous(), OPERATION.choose(scores))
    return keep
