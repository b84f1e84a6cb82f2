"""The distributional loss: squared 1-D Wasserstein-2 distances, neuron by neuron."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_w2(x: Tensor, y: Tensor) -> Tensor:
    """Squared Wasserstein-2 distance between two empirical distributions of every neuron (section 3).

    On the line the optimal transport matches quantiles: with equally many samples, the sorted ones; otherwise the
    quantile functions, both step functions, are compared exactly between all their steps.

    Args:
        x: (n, d) samples. y: (m, d) samples.

    Returns:
        (d,), differentiable in both.
    """
    x, y = x.sort(0).values, y.sort(0).values
    n, m = len(x), len(y)
    if n == m:
        return (x - y).square().mean(0)
    # Edges of the steps in units of 1/(n m), so that they are whole numbers.
    edges = torch.unique(torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]))
    start, width = edges[:-1], edges[1:] - edges[:-1]
    gap = x[(start // m).to(x.device)] - y[(start // n).to(y.device)]
    return (gap.square() * (width / (n * m)).to(gap)[:, None]).sum(0)
