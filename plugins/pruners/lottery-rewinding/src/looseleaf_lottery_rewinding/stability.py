"""How far two trainings of one ticket on differently ordered data end from each other."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from looseleaf_tickets import Ticket, train_ticket
from looseleaf_tickets.training import Train


@dataclasses.dataclass(frozen=True)
class Stability:
    """Smaller is more stable. [section on stability]

    Attributes:
        distance: L2 distance of the two trained weight vectors.
        angle: between the displacements of the two from the common start, in degrees; 0: the same direction.
        travelled: L2 lengths of the two displacements.
    """

    distance: float
    angle: float
    travelled: tuple[float, float]


def stability(ticket: Ticket, model: nn.Module, train: Train, seeds: tuple[int, int] = (0, 1)) -> Stability:
    """Train a ticket twice from the same start with different data order, and compare what came of it.

    Counted are the weights that the ticket's masks cover and keep; biases and norms are not.

    Args:
        ticket: with the start to train from.
        model: its architecture; not changed.
        train: see :func:`looseleaf_tickets.train_ticket`. The order of its data must come from ``run.seed``,
            ``run.batches`` or torch's global generator; nothing else may differ between two calls.
        seeds: of the two trainings.

    Raises:
        ValueError: the seeds are equal, or both trainings gave the same weights; what
            :func:`looseleaf_tickets.train_ticket` raises.
    """
    if seeds[0] == seeds[1]:
        raise ValueError(f"seeds: expected two different ones, since the order of the data must differ, got {seeds}")
    start = _vector(ticket, ticket.start)
    first, second = (_vector(ticket, dict(train_ticket(ticket, model, train, seed=seed).model.named_parameters()))
                     for seed in seeds)
    if torch.equal(first, second):
        raise ValueError("both trainings ended at the same weights: the order of the data must depend on run.seed, "
                         "run.batches or torch's global generator")
    one, two = first - start, second - start
    cosine = float(one @ two / (one.norm() * two.norm()))
    return Stability(float((first - second).norm()), math.degrees(math.acos(max(-1.0, min(1.0, cosine)))),
                     (float(one.norm()), float(two.norm())))


def _vector(ticket: Ticket, weights: dict[str, Tensor]) -> Tensor:
    """The kept weights, in double precision on the CPU."""
    return torch.cat([weights[name].detach().cpu()[mask.cpu()].double() for name, mask in ticket.masks.items()])
