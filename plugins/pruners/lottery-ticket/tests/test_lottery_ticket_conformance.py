"""LotteryTicket passes the conformance kit."""

from __future__ import annotations

from typing import Any

import pytest

from looseleaf.testing import check_pruner
from looseleaf_lottery_ticket import LotteryTicket


@pytest.mark.parametrize("fields", [{"rounds": 2}, {"sparsity": 0.6, "fraction": 0.5, "scope": "global"}])
def test_conformance(fields: dict[str, Any]) -> None:
    check_pruner(LotteryTicket, lambda: LotteryTicket(**fields))
