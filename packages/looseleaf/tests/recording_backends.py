"""Attention backends for tests: exact, or half of it, in every phase, with a record of their calls."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from looseleaf import AttentionBackend, AttentionCall, Paper, SlidingWindow
from looseleaf.attention.call import Phase

ALL: frozenset[Phase] = frozenset({"prefill", "decode", "bidirectional"})
PAPER = SlidingWindow.paper


@dataclasses.dataclass
class Spy(AttentionBackend):
    """Exact attention in every phase that keeps its calls."""

    phases = ALL
    paper: ClassVar[Paper] = PAPER

    def __post_init__(self) -> None:
        super().__post_init__()
        self.calls: list[AttentionCall] = []

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self.calls.append(call)
        return call.dense()


@dataclasses.dataclass
class Takes(Spy):
    """As Spy, of layers that change their scores."""

    score_changes = frozenset({"softcap", "s_aux", "position_bias", "dropout"})


@dataclasses.dataclass
class Halved(Spy):
    """Another result than exact attention: half of it."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        return super().attend(call) / 2
