"""Selection by cumulative mass in plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def top_mass(scores: Tensor, mass: Tensor) -> Tensor:
    """As the reference, by a stable sort and a running sum in fp32."""
    values, order = torch.sort(scores.float(), dim=-1, descending=True, stable=True)
    values = values.clamp(min=0)
    before = values.cumsum(-1, dtype=torch.float64) - values.double()
    target = mass.double().unsqueeze(-1) * values.sum(-1, keepdim=True, dtype=torch.float64)
    keep = (before < target) & (values > 0)
    return torch.zeros_like(keep).scatter_(-1, order, keep)
