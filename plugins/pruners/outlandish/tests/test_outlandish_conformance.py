"""IgnoreTopK and PrimingProbe pass the conformance kits."""

from typing import Any

import pytest

from looseleaf.testing import check_probe, check_pruner
from looseleaf_outlandish import IgnoreTopK, PrimingProbe


@pytest.mark.parametrize("fields", [{}, {"k": 0.3, "scope": "global"}, {"k": 0.0}, {"k": 1.0}, {"when": "end"}])
def test_pruner(fields: dict[str, Any]) -> None:
    check_pruner(IgnoreTopK, lambda: IgnoreTopK(**fields))


@pytest.mark.parametrize("fields", [{}, {"ignore_top_k": 0.08}])
def test_probe(fields: dict[str, Any]) -> None:
    check_probe(PrimingProbe, lambda: PrimingProbe(steps=2, samples=3, lr=1e-3, **fields))
