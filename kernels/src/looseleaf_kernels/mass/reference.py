"""Selection by cumulative mass, score by score: obviously right."""

from __future__ import annotations

import torch
from torch import Tensor


def top_mass(scores: Tensor, mass: Tensor) -> Tensor:
    """The smallest set of largest scores whose sum reaches ``mass`` of the total."""
    flat = scores.reshape(-1, scores.shape[-1])
    target = mass.expand(scores.shape[:-1]).reshape(-1)
    out = torch.zeros_like(flat, dtype=torch.bool)
    for row in range(flat.shape[0]):
        values = flat[row].to(torch.float64)
        total, reached = float(values.sum()), 0.0
        for n in torch.argsort(values, descending=True, stable=True).tolist():
            if reached >= float(target[row]) * total or float(values[n]) <= 0:
                break
            out[row, n] = True
            reached += float(values[n])
    return out.view_as(scores)
