"""Iterative magnitude pruning that goes back to early training."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from looseleaf import Paper
from looseleaf_tickets import IterativePruner
from looseleaf_tickets.iterative import check_rewind


@dataclasses.dataclass
class LotteryRewinding(IterativePruner):
    """Train, remove the smallest of the remaining weights, take the others back to step k of the first training.

    With k = 0 this is the lottery ticket procedure, which finds no winning tickets in deeper networks; the weights
    after 0.1 to 7 % of the training do [abstract]. ``find`` gives all tickets, ``prune(model, data=train)`` the masks
    of the last round.

    Args:
        rewind_to: k, as a step of the first training run (int >= 0) or a fraction of it (float in [0, 1)). The training
            function must report its steps, see :class:`looseleaf_tickets.TrainingRun`.
        rounds: how often weights are removed; None: as often as ``sparsity`` needs, or 8 times without one. With
            ``sparsity``: the most rounds to make.
        fraction: fraction of the remaining weights that goes in a round, in (0, 1).
        sparsity: fraction of the weights to remove in all, in [0, 1); the last round then removes only what is missing.
        scope: "global" compares all weights together, "layer" removes the same fraction of each parameter.
        half_rate_layers: patterns of layers that are pruned at half of ``fraction``, and apart from the others.
        targets: patterns of the weights to prune; None: every Linear and convolution of the body.
        exclude: patterns of weights to leave out.
        seed: random seed of each training run.
    """

    rewind_to: int | float = 0.05

    paper: ClassVar[Paper] = Paper(
        title="Stabilizing the Lottery Ticket Hypothesis",
        authors=("Jonathan Frankle", "Gintare Karolina Dziugaite", "Daniel M. Roy", "Michael Carbin"), year=2019,
        arxiv="1903.01611", code="https://github.com/facebookresearch/open_lth",
        summary="Lottery tickets for deeper networks: sparse sub-networks that train well from early in training.")

    def validate(self) -> None:
        """See :class:`looseleaf.Plugin`."""
        super().validate()
        check_rewind("LotteryRewinding.rewind_to", self.rewind_to)

    def rewinding(self) -> int | float:
        """``rewind_to``."""
        return self.rewind_to
