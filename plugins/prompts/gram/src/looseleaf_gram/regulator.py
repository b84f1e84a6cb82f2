"""The gradient regulating function M: one small network for each prompt tensor, with the gradient's own shape.

What the paper's network is could not be read; ``gated`` is reconstructed from the code of the same group's SUPMER.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["gated", "affine", "none"]
HIDDEN = 24
"""Units of the gate (SUPMER's code)."""
TINY = 1e-8
"""Added to the norms of rows (SUPMER's code)."""
OPEN = 2.0
"""Bias of the gate at the start, z about 0.88: most of the gradient passes as it is (ours)."""


class LowRank(nn.Module):
    """x -> U (V x) + b of rank min(rank, width)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        rank = min(rank, width)
        self.u, self.v = nn.Parameter(torch.empty(width, rank)), nn.Parameter(torch.empty(rank, width))
        nn.init.xavier_uniform_(self.u)
        nn.init.xavier_uniform_(self.v)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, width) -> (rows, width)."""
        return x @ self.v.T @ self.u.T + self.bias


class Gated(nn.Module):
    """(1 - z) x + z g: rows x made of the rows of g and as long as they are, z from the mean feature of the batch.

    Args:
        width: of a row.
        dim: of the features.
        rank: of the two layers; at most ``width``.
        final_relu: a ReLU after the second layer too, as SUPMER has it: no component of x is then negative.
    """

    def __init__(self, width: int, dim: int, rank: int, final_relu: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.final_relu = LowRank(width, rank), LowRank(width, rank), final_relu
        self.gate = nn.Sequential(nn.Linear(dim, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
        last = self.gate[2]
        assert isinstance(last, nn.Linear)
        nn.init.constant_(last.bias, OPEN)

    def bent(self, rows: Tensor) -> Tensor:
        """x (rows, width): what the layers make of the rows, scaled to their norms."""
        x = self.second(torch.relu(self.first(rows)))
        x = torch.relu(x) if self.final_relu else x
        return x / (x.norm(dim=-1, keepdim=True) + TINY) * (rows.norm(dim=-1, keepdim=True) + TINY)

    def forward(self, rows: Tensor, feature: Tensor) -> Tensor:
        """(rows, width) and the mean feature (dim,) -> (rows, width)."""
        z = torch.sigmoid(self.gate(feature))
        return (1 - z) * self.bent(rows) + z * rows


class Affine(nn.Module):
    """a * g + c per dimension; the identity at the start, so that it is plain MAML before training (ours).

    Args:
        width: of a row.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, rows: Tensor, feature: Tensor) -> Tensor:
        """(rows, width) -> (rows, width)."""
        return self.scale * rows + self.shift


class Regulator(nn.Module):
    """M: gradients of prompt tensors in, gradients of the same shapes out.

    Args:
        widths: name of each prompt tensor -> the length of its rows, which is its last dimension.
        dim: of the features of pictures; read by ``gated``.
        kind: ``gated``, ``affine`` or ``none`` (gradients pass as they are).
        rank: see :class:`Gated`.
        final_relu: see :class:`Gated`.
        seed: of the weights at the start.
    """

    def __init__(self, widths: Mapping[str, int], dim: int, kind: Kind = "gated", *, rank: int = 64,
                 final_relu: bool = False, seed: int = 0) -> None:
        super().__init__()
        if kind not in ("gated", "affine", "none"):
            raise ValueError(f"kind: expected 'gated', 'affine' or 'none', got {kind!r}")
        self.widths, self.dim, self.kind, self.rank, self.final_relu = dict(widths), dim, kind, rank, final_relu
        self.feature: Tensor | None = None
        self.parts = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, width in widths.items() if kind != "none" else ():
                self.parts[_key(name)] = Gated(width, dim, rank, final_relu) if kind == "gated" else Affine(width)

    def observe(self, features: Tensor) -> None:
        """Take the features (B, dim) of a batch by the frozen picture tower: their mean opens and closes the gates.

        Raises:
            ValueError: features of another width, or that are not finite.
        """
        if features.dim() != 2 or not len(features) or features.shape[1] != self.dim:
            raise ValueError(f"features: expected (B, {self.dim}) of one picture or more, got {tuple(features.shape)}")
        mean = features.detach().mean(0)
        if not bool(torch.isfinite(mean).all()):
            raise ValueError("features: expected finite numbers, got NaN or infinity")
        self.feature = mean

    def forward(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """M of each gradient, by name.

        Raises:
            ValueError: a tensor that there is no network for, one of another width, or no batch observed yet.
        """
        if self.kind == "none":
            return dict(gradients)
        if self.kind == "gated" and self.feature is None:
            raise ValueError("Regulator: expected the features of the batch before its gradients, got none: call "
                             "observe(features)")
        feature = self.feature if self.feature is not None else torch.zeros(0)
        out = {}
        for name, gradient in gradients.items():
            self.check(name, gradient)
            part = self.parts[_key(name)]
            weight = next(part.parameters())
            rows = gradient.to(weight.dtype).reshape(-1, gradient.shape[-1])
            out[name] = part(rows, feature.to(weight)).reshape(gradient.shape).to(gradient.dtype)
        return out

    def check(self, name: str, tensor: Tensor) -> None:
        """Raise ValueError unless there is a network for a tensor of this name and width."""
        if name not in self.widths:
            raise ValueError(f"Regulator: expected tensors named {', '.join(self.widths)}, got {name!r}")
        if tensor.dim() < 1 or tensor.shape[-1] != self.widths[name]:
            raise ValueError(f"Regulator: expected rows of {self.widths[name]} numbers for {name!r}, got a tensor of "
                             f"the shape {tuple(tensor.shape)}: the regulator was learned for another width")


@contextlib.contextmanager
def regulated(parameters: Mapping[str, Tensor], regulator: Regulator) -> Iterator[None]:
    """Replace the gradients of some tensors by M of them, in whatever loop and with whatever optimiser.

    It happens inside ``backward()``, that is before clipping and before the optimiser's step. SGD keeps the length
    that M gives to a gradient; Adam hides it. Where M reads features, call ``regulator.observe(features)`` before
    each ``backward()``.

    Args:
        parameters: the regulator's names -> leaf tensors that ask for a gradient.
        regulator: left as it is; it may be on any device.

    Raises:
        ValueError: a tensor that the regulator does not know, of another width, or without gradient.
    """
    for name, tensor in parameters.items():
        if regulator.kind != "none":
            regulator.check(name, tensor)
        if not (tensor.is_leaf and tensor.requires_grad):
            raise ValueError(f"regulated: expected leaf tensors that ask for a gradient, got {name!r} without")

    def bend(name: str, gradient: Tensor) -> Tensor:
        with torch.no_grad():
            return regulator({name: gradient})[name]

    handles = [] if regulator.kind == "none" else [
        tensor.register_hook(lambda gradient, name=name: bend(name, gradient))  # type: ignore[misc,no-untyped-call]
        for name, tensor in parameters.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def widths_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The length of the rows of tensors of these shapes."""
    return {name: int(shape[-1]) for name, shape in shapes.items()}


def _key(name: str) -> str:
    return name.replace(".", "-")  # a module's name has no dots


__all__ = ["Affine", "Gated", "Kind", "Regulator", "regulated", "widths_of"]
