"""Lottery tickets: sparse sub-networks that train as well as the whole network, and their controls."""

from looseleaf_lottery_ticket.controls import random_mask, random_reinit
from looseleaf_lottery_ticket.pruner import LotteryTicket

__version__ = "0.2.1"
__all__ = ["LotteryTicket", "random_mask", "random_reinit"]
