"""LeaF passes the conformance kit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from looseleaf.testing import check_pruner
from looseleaf_leaf import LeaF
from looseleaf_leaf.kit import teacher

torch.set_num_threads(1)


@pytest.mark.parametrize("fields", [{}, {"q": 0.3}, {"tau": 0.4}, {"mistakes_only": True}])
def test_conformance(fields: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    check_pruner(LeaF, lambda: LeaF(**fields).with_teacher(teacher()))
