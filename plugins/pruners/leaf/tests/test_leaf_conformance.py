"""LeaF passes the conformance kit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from looseleaf.testing import conformance_tests
from looseleaf_leaf import LeaF

pytest.importorskip("transformers")
torch.set_num_threads(1)
TEACHER = LeaF.conformance()["make"]().teacher


def variant(**fields: Any) -> dict[str, Any]:
    """LeaF with these fields, and the teacher of its own conformance."""
    return {"make": lambda: LeaF(**fields).with_teacher(TEACHER)}


def teacher_is_right(model: Any, batch: Any) -> torch.Tensor:
    """A judge for random models, which answer nothing."""
    return torch.full((len(batch["input_ids"]),), model is TEACHER)


test_conformance = conformance_tests(LeaF, {
    "": {}, "q": variant(q=0.3), "tau": variant(tau=0.4),
    "mistakes": variant(mistakes_only=True, judge=teacher_is_right)})
