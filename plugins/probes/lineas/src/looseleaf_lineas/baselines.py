"""What LinEAS is compared with: a shift by the difference in means, and affine transport layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf import intervene
from looseleaf.modes import evaluating
from looseleaf_lineas.probe import body, encode, pooled, token_weights
from looseleaf_lineas.steering import BoundedSteering, Steering


def difference_in_means(model: nn.Module, source: Sequence[str], target: Sequence[str], tokenizer: Any, *,
                        modules: str = "*layernorm", skip_first: bool = True) -> Steering:
    """Add the mean target activation less the mean source activation (ActAdd, CAA), at every steered module."""
    device = next(model.parameters()).device
    with evaluating(model):
        x = pooled(model, modules, encode(tokenizer, source, device), skip_first)
        y = pooled(model, modules, encode(tokenizer, target, device), skip_first)
    return Steering({n: torch.ones_like(x[n][0]) for n in x}, {n: y[n].mean(0) - x[n].mean(0) for n in x},
                    {"method": "difference in means"})


def lin_act(model: nn.Module, source: Sequence[str], target: Sequence[str], tokenizer: Any, *,
            modules: str = "*layernorm", skip_first: bool = True) -> BoundedSteering:
    """Lin-AcT: closed-form affine transport of every neuron, each layer seeing the layers before it steered.

    With both sides sorted, ``omega`` is the slope of the least-squares line through the matched quantiles. An
    activation is moved only inside the range of the source's pooled activations (their 0th to 100th percentile, the
    default of the authors' code). Needs equally many source and target sentences. [Rodriguez et al., 2025,
    arXiv 2410.23054]

    Raises:
        ValueError: not equally many.
    """
    if len(source) != len(target):
        raise ValueError(f"expected as many source as target sentences, got {len(source)} and {len(target)}")
    device = next(model.parameters()).device
    batch = encode(tokenizer, source, device)
    mean = token_weights(batch["attention_mask"], skip_first)
    maps: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
    with evaluating(model), torch.no_grad():
        goal = pooled(model, modules, encode(tokenizer, target, device), skip_first)

        def fit(name: str) -> Callable[[Tensor], Tensor]:
            def function(z: Tensor) -> Tensor:
                # one forward pass is enough: what arrives here has gone through the maps of all layers before
                x, y = (z.float() * mean).sum(1).sort(0).values, goal[name].sort(0).values
                middle_x, middle_y = x.mean(0), y.mean(0)
                spread = (x - middle_x).square().sum(0)
                omega = ((x - middle_x) * (y - middle_y)).sum(0) / spread.clamp(min=1e-12)
                omega = torch.where(spread > 1e-12, omega, torch.ones_like(omega))
                maps[name] = (omega, middle_y - omega * middle_x, x[0], x[-1])
                inside = (z > x[0]) & (z < x[-1])
                return torch.where(inside, z * omega + maps[name][1], z).to(z.dtype)

            return function

        with intervene(model, {name: fit(name) for name in goal}):
            body(model)(**batch)
    omega, bias, low, high = ({name: parts[n] for name, parts in maps.items()} for n in range(4))
    return BoundedSteering(omega, bias, low, high, {"method": "Lin-AcT"})
