"""LotteryRewinding passes the conformance kit."""

from __future__ import annotations

from typing import Any

import pytest

from looseleaf.testing import check_pruner
from looseleaf_lottery_rewinding import LotteryRewinding


@pytest.mark.parametrize("fields", [{"rounds": 2, "rewind_to": 1},
                                    {"sparsity": 0.6, "fraction": 0.5, "rewind_to": 0.3}])
def test_conformance(fields: dict[str, Any]) -> None:
    check_pruner(LotteryRewinding, lambda: LotteryRewinding(**fields))
