"""Iterative magnitude pruning that goes back to the initial weights."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from looseleaf import Paper
from looseleaf_tickets import IterativePruner


@dataclasses.dataclass
class LotteryTicket(IterativePruner):
    """Train, remove the smallest of the remaining weights, reset the others to their initial values, and again.

    ``find`` gives all tickets, ``prune(model, data=train)`` the masks of the last round. After i rounds
    ``(1 - fraction)^i`` of the weights are left. [section 1, "Identifying winning tickets", strategy of section 2]

    Args:
        rounds: how often weights are removed; None: as often as ``sparsity`` needs, or 8 times without one. With
            ``sparsity``: the most rounds to make.
        fraction: fraction of the remaining weights that goes in a round, in (0, 1) [section 2: 0.2].
        sparsity: fraction of the weights to remove in all, in [0, 1); the last round then removes only what is missing.
        scope: "layer" removes the same fraction of each parameter, as the paper does in fully connected networks;
            "global" compares all weights together, as it does in deep ones.
        half_rate_layers: patterns of layers that are pruned at half of ``fraction``, as the paper does with the output
            layer.
        targets: patterns of the weights to prune; None: every Linear and convolution of the body.
        exclude: patterns of weights to leave out.
        seed: random seed of each training run.
    """

    scope: Literal["global", "layer"] = "layer"

    paper: ClassVar[Paper] = Paper(
        title="The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks",
        authors=("Jonathan Frankle", "Michael Carbin"), year=2019, arxiv="1803.03635", venue="ICLR 2019",
        code="https://github.com/google-research/lottery-ticket-hypothesis",
        summary="The sparse sub-network of your model that trains as well as the whole, from the same initial weights.")

    def rewinding(self) -> int:
        """Step 0: the initial weights."""
        return 0
