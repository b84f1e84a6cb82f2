"""LotteryRewinding passes the conformance kit."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from looseleaf import TrainingRun
from looseleaf.testing import check_pruner
from looseleaf.testing.pruners import training
from looseleaf_lottery_rewinding import LotteryRewinding


def stepwise(model: nn.Module) -> Any:
    """The kit's training, which tells its steps."""
    train = training(model)

    def told(model: nn.Module, run: TrainingRun) -> None:
        for _ in run.steps(3):
            train(model)

    return told


@pytest.mark.parametrize("fields", [{"rounds": 2, "rewind_to": 1},
                                    {"sparsity": 0.6, "fraction": 0.5, "rewind_to": 0.3}])
def test_conformance(fields: dict[str, Any]) -> None:
    check_pruner(LotteryRewinding, lambda: LotteryRewinding(**fields), data=stepwise)
