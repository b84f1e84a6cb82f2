"""Turning a layer's contribution to the residual stream down."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn

from looseleaf.probes.hooks import intervene
from looseleaf_text.layers import PARTS, contribution, decoder_layers


@contextmanager
def scale_layers(model: nn.Module, alphas: Mapping[int, float], part: Literal["attention", "mlp", "both"] = "both", *,
                 layers: str | None = None) -> Iterator[None]:
    """Multiply what layers add to the residual stream while the ``with`` block runs.

    Args:
        model: a decoder of transformers.
        alphas: layer -> factor; layers count from 0, negative ones from the end. 0 takes a contribution out, 1 leaves
            the model as it is, bit for bit. Gradients flow through.
        part: the attention's contribution, the MLP's, or each of the two.
        layers: name of the list of layers; None: it is found.

    Raises:
        ValueError: a layer that does not exist, a factor that is not finite, or an unknown part.
        UnsupportedModelError: the model's layers or their parts could not be found.
    """
    stack = list(decoder_layers(model, layers).items())
    wanted = PARTS if part == "both" else (part,)
    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    for layer, alpha in alphas.items():
        if not isinstance(layer, int) or not -len(stack) <= layer < len(stack):
            raise ValueError(f"layer: expected an integer in [{-len(stack)}, {len(stack) - 1}], for {len(stack)} "
                             f"layers of {type(model).__name__}, got {layer!r}")
        if not math.isfinite(alpha):
            raise ValueError("alphas: expected a finite number such as 0 (nothing is added) or 1 (as it is), got "
                             f"{alpha!r} for layer {layer}")
        for name in (contribution(*stack[layer], p) for p in wanted):
            if name in changes:
                raise ValueError(f"alphas: expected one factor for each layer, got two for layer {layer}, which is "
                                 "named from the start and from the end")
            changes[name] = _times(alpha)
    with intervene(model, changes):
        yield


def _times(alpha: float) -> Callable[[Tensor], Tensor]:
    return (lambda output: output) if alpha == 1 else lambda output: output * alpha


__all__ = ["scale_layers"]
