"""One layer of multi-head attention, by its effective matrices KQ_h = K_h^T Q_h and OV_h = O_h V_h (section 2)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from looseleaf.errors import did_you_mean
from looseleaf_icl_linear_regression.task import Sequences

Attention = Literal["softmax", "linear"]
KINDS = ("softmax", "linear")


class Weights(NamedTuple):
    """The matrices of all heads, with D = d + N rows of Z; leading dimensions (seeds) may stand before H.

    Attributes:
        key, query, value: (H, D, D).
        output: (H, N, D): the rows that reach the predictions. The other rows of O_h change nothing that is read.
    """

    key: Tensor
    query: Tensor
    value: Tensor
    output: Tensor

    def kq(self) -> Tensor:
        """KQ_h, (H, D, D), without the columns that meet the query's values.

        Those are 0 in every sequence, so the columns change no prediction and get no gradient: they are set to 0 here.
        """
        full = self.key.transpose(-1, -2) @ self.query
        tasks = self.output.shape[-2]
        return torch.cat([full[..., :-tasks], torch.zeros_like(full[..., -tasks:])], -1)

    def ov(self) -> Tensor:
        """The last N rows of OV_h, (H, N, D)."""
        return self.output @ self.value


def initial_weights(d: int, heads: int, tasks: int, generator: torch.Generator) -> Weights:
    """The random start: uniform within +- 1 / sqrt(inputs) as torch's linear layers have it, scores over sqrt(D)."""
    size = d + tasks

    def uniform(rows: int, inputs: int) -> Tensor:
        return (torch.rand(heads, rows, size, generator=generator) * 2 - 1) / inputs ** 0.5

    key, query, value = (uniform(size, size) for _ in range(3))
    return Weights(key / size ** 0.25, query / size ** 0.25, value, uniform(tasks, heads * size))


def opposite_heads(d: int, omega: float, mu: float, dtype: torch.dtype = torch.float64) -> Weights:
    """The construction: two heads, KQ = +-omega diag(I_d, 0) and OV = +-mu in the last entry alone (section 3)."""
    return constructed([omega, -omega], [mu, -mu], d, dtype)


def constructed(omega: list[float], mu: list[float], d: int, dtype: torch.dtype = torch.float64) -> Weights:
    """Heads with KQ_h = omega_h diag(I_d, 0) and OV_h = mu_h in the last entry alone."""
    if len(omega) != len(mu) or not omega:
        raise ValueError(f"{len(omega)} values omega and {len(mu)} values mu: allowed is equally many, at least one")
    covariates = torch.diag(torch.tensor([1.0] * d + [0.0], dtype=dtype))
    last = torch.zeros(1, d + 1, dtype=dtype)
    last[0, d] = 1
    heads = len(omega)
    return Weights(covariates.expand(heads, -1, -1), torch.stack([o * covariates for o in omega]),
                   torch.eye(d + 1, dtype=dtype).expand(heads, -1, -1), torch.stack([m * last for m in mu]))


def predict(kq: Tensor, ov: Tensor, data: Sequences, attention: str = "softmax",
            normaliser: float | None = None) -> Tensor:
    """The last N entries of the query column, (..., B, N).

    Args:
        kq: (..., H, D, D). ov: (..., H, N, D).
        data: sequences; their leading dimensions are those of the matrices, or none.
        attention: ``softmax``, or ``linear``: the scores as they are, over ``normaliser``.
        normaliser: what linear attention divides the sum over the context by; None: the length of the context.
            A linear layer that was trained at one length keeps that length, for nothing in it counts.

    Raises:
        ValueError: an unknown kind of attention.
    """
    if attention not in KINDS:
        raise ValueError(f"attention={attention!r}: allowed are {', '.join(KINDS)}.{did_you_mean(attention, KINDS)}")
    heads, tasks, size = ov.shape[-3:]
    turned = data.query @ kq.flatten(-3, -2).transpose(-1, -2)  # rows KQ_h z_q, heads side by side
    scores = data.context @ turned.unflatten(-1, (heads, size)).transpose(-1, -2)  # (..., B, L, H)
    if attention == "softmax":
        shares = torch.softmax(scores, -2)
    else:
        shares = scores / (data.context.shape[-2] if normaliser is None else normaliser)
    values = (data.context @ ov.flatten(-3, -2).transpose(-1, -2)[..., None, :, :]).unflatten(-1, (heads, tasks))
    return (shares[..., None] * values).sum((-3, -2))


def predict_reference(weights: Weights, data: Sequences) -> Tensor:
    """The same, written as the paper does: TF(Z) = Z + sum_h O_h V_h Z softmax(Z^T K_h^T Q_h Z), one Z at a time.

    The query attends to the L columns before it and not to itself. (B, N).
    """
    tasks = weights.output.shape[-2]
    out = []
    for context, query in zip(data.context, data.query, strict=True):
        z = torch.cat([context, query[None]]).T
        visible = torch.ones(z.shape[1], dtype=torch.bool)
        visible[-1] = False
        column = z[-tasks:, -1].clone()
        for key, turn, value, output in zip(*weights, strict=True):
            scores = (z.T @ key.T @ turn @ z)[:, -1]
            column += output @ value @ z @ torch.softmax(scores.masked_fill(~visible, -torch.inf), 0)
        out.append(column)
    return torch.stack(out)


__all__ = ["Weights", "constructed", "initial_weights", "opposite_heads", "predict", "predict_reference"]
