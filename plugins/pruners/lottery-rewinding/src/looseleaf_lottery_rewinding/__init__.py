"""Lottery tickets that go back to early training, and how stable their training is."""

from looseleaf_lottery_rewinding.pruner import LotteryRewinding
from looseleaf_lottery_rewinding.stability import Stability, stability

__version__ = "0.2.1"
__all__ = ["LotteryRewinding", "Stability", "stability"]
