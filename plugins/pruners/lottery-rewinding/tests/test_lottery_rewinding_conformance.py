"""LotteryRewinding passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_lottery_rewinding import LotteryRewinding

test_conformance = conformance_tests(LotteryRewinding, {
    "": {}, "from a step": {"make": lambda: LotteryRewinding(rounds=2, rewind_to=1)},
    "to a sparsity": {"make": lambda: LotteryRewinding(sparsity=0.6, fraction=0.5, rewind_to=0.3)}})
