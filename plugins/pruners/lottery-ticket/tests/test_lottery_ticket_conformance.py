"""LotteryTicket passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_lottery_ticket import LotteryTicket

test_conformance = conformance_tests(LotteryTicket, {
    "": {}, "to a sparsity": {"make": lambda: LotteryTicket(sparsity=0.6, fraction=0.5, scope="global")}})
