"""The signature of trained heads: in the task's coordinates, for other tasks, and in a form without coordinates."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from looseleaf_icl_linear_regression.regression import Regression, optimal_preconditioner

LIMITS = {"off_diagonal": 0.1, "variation": 0.1, "last_entry": 0.95, "zero_sum": 0.05}
"""What a layer must keep to: below, below, above, below. This project's rule."""
TINY = 1e-30


@dataclasses.dataclass
class Signature:
    """Scores of the heads of one layer; perfect values in brackets.

    Attributes:
        omega: (H,) mean of the diagonal of KQ over the covariates.
        mu: (H,) the entry of OV that takes the value coordinate to itself; without one, the largest entry.
        off_diagonal: (H,) mean |entry| off the diagonal over mean |entry| on it [0].
        variation: (H,) standard deviation of the diagonal over |its mean| [0].
        value_row: (H,) mean |entry| of KQ where a key's value meets a query's covariates, over mean |diagonal| [0].
        last_entry: (H,) |mu| over the sum of |entries| of OV [1].
        zero_sum: norm of sum_h OV_h over the sum of their norms; |sum_h mu_h| / sum_h |mu_h| of last entries [0].
        weight: (H,) the head's part of sum_h |mu_h omega_h|, the step of gradient descent. Heads beyond two may die,
            and what a dead head's matrices look like means nothing: means over heads are weighted by this.
    """

    omega: Tensor
    mu: Tensor
    off_diagonal: Tensor
    variation: Tensor
    value_row: Tensor
    last_entry: Tensor
    zero_sum: float
    weight: Tensor

    def mean(self, name: str) -> float:
        """A score as one number: the mean over heads by :attr:`weight`; ``zero_sum`` as it is."""
        value = getattr(self, name)
        return float(value) if name == "zero_sum" else float((value * self.weight).sum())

    def fails(self, zero_sum: bool = True) -> list[str]:
        """Names of the scores that miss :data:`LIMITS`; ``zero_sum`` can be left out for a single head."""
        out = []
        for name, limit in LIMITS.items():
            value = self.mean(name)
            good = value > limit if name == "last_entry" else value < limit
            if not good and (zero_sum or name != "zero_sum"):
                out.append(name)
        return out


def head_signature(kq: Tensor, ov: Tensor, values: int = 1) -> Signature:
    """The scores of section 3 in given coordinates.

    Args:
        kq: (H, D, D); entry (i, j) weighs coordinate i of a key with coordinate j of a query.
        ov: (H, N, D) the rows of OV that reach the values, or (H, D, D) all rows.
        values: how many of the last coordinates are values (y). 0: none is known to be, as in a language model: the
            diagonal is taken over all coordinates, and ``last_entry`` is the fraction of the largest entry.

    Raises:
        ValueError: shapes that do not fit, or entries that are not finite.
    """
    if kq.dim() != 3 or kq.shape[1] != kq.shape[2] or ov.dim() != 3 or len(ov) != len(kq) \
            or ov.shape[2] != kq.shape[2] or ov.shape[1] not in (values, kq.shape[2]):
        raise ValueError(f"kq and ov: expected (H, D, D) for both, or (H, {values}, D) for ov with {values} value "
                         f"coordinates, got {tuple(kq.shape)} and {tuple(ov.shape)}")
    if not 0 <= values <= kq.shape[1] - 2:
        raise ValueError(f"values: expected an integer in [0, {kq.shape[1] - 2}] for D = {kq.shape[1]}, got {values}")
    if not bool(torch.isfinite(kq).all() and torch.isfinite(ov).all()):
        raise ValueError("kq or ov has entries that are not finite: was the training stable?")
    d = kq.shape[1] - values
    block = kq[:, :d, :d]
    diagonal = block.diagonal(dim1=1, dim2=2)
    size = diagonal.abs().mean(1).clamp(min=TINY)
    off = (block.abs().sum((1, 2)) - diagonal.abs().sum(1)) / (d * (d - 1))
    omega = diagonal.mean(1)
    flat = ov.flatten(1)
    if values:
        mu = ov[:, -values, d]
        zero_sum = float(mu.sum().abs() / mu.abs().sum().clamp(min=TINY))
        row = kq[:, d:, :d].abs().mean((1, 2)) / size
    else:
        mu = flat.gather(1, flat.abs().argmax(1, keepdim=True))[:, 0]
        zero_sum = float(ov.sum(0).norm() / ov.flatten(1).norm(dim=1).sum().clamp(min=TINY))
        row = torch.zeros_like(omega)
    weight = (mu * omega).abs()
    total = weight.sum()
    weight = weight / total if total > 0 else torch.full_like(weight, 1 / len(weight))
    return Signature(omega, mu, off / size, diagonal.std(1, unbiased=False) / omega.abs().clamp(min=TINY), row,
                     mu.abs() / flat.abs().sum(1).clamp(min=TINY), zero_sum, weight)


@dataclasses.dataclass
class Invariants:
    """What the signature leaves when the coordinates are unknown: no rotation of the stream changes these.

    Attributes:
        isotropy: (H,) tr KQ / (sqrt(r) |KQ|), r the largest rank it can have: 1 or -1 exactly where KQ is a positive or
            negative multiple of an orthogonal projection of rank r, as omega diag(I_d, 0) is; near 0 for random heads.
        rank_one: (H,) largest squared singular value of OV over the sum of all: 1 where OV moves one number only.
        zero_sum: norm of sum_h OV_h over the sum of their norms: 0 where the heads cancel, 1 / sqrt(H) for random ones.
        opposite: how near the best pair of heads comes to KQ_a = -KQ_b and OV_a = -OV_b up to scale: minus the larger
            of the two cosines. 1: exactly opposite; near 0: unrelated.
        pair: the two heads.
    """

    isotropy: Tensor
    rank_one: Tensor
    zero_sum: float
    opposite: float
    pair: tuple[int, int] | None


def invariants(key: Tensor, query: Tensor, value: Tensor, output: Tensor, rank: int | None = None) -> Invariants:
    """Scores that do not depend on the basis, from the factors: no matrix of the stream's size is made.

    Args:
        key, query: (H, r, D) with KQ_h = key_h^T query_h. value: (H, s, D). output: (H, N, s) with
            OV_h = output_h value_h.
        rank: the largest rank of KQ; None: r.
    """
    heads, width = key.shape[:2]
    trace = (key * query).sum((1, 2))
    # <A^T B, C^T E> = sum of (A C^T) o (B E^T), in all pairs of heads
    kq = _products(key, query)
    ov = _products(output.transpose(1, 2), value)
    kq_norm = kq.diagonal().clamp(min=0).sqrt()
    ov_norm = ov.diagonal().clamp(min=0).sqrt()
    bound = min(width if rank is None else rank, key.shape[2])
    cosines = [_cosine(m) for m in (kq, ov)]
    pairs = {(a, b): -max(float(c[a, b]) for c in cosines) for a, b in itertools.combinations(range(heads), 2)}
    best = max(pairs, key=lambda p: pairs[p]) if pairs else None
    squares = torch.stack([_top_square(o, v) for o, v in zip(output, value, strict=True)])
    return Invariants(trace / (bound ** 0.5 * kq_norm).clamp(min=TINY),
                      squares / ov.diagonal().clamp(min=TINY),
                      float(ov.sum().clamp(min=0).sqrt() / ov_norm.sum().clamp(min=TINY)),
                      pairs[best] if best else float("nan"), best)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """(H, H) inner products of the matrices left_h^T right_h; left and right are (H, r, D) and (H, r, D')."""
    heads, width = left.shape[:2]
    a, b = left.flatten(0, 1), right.flatten(0, 1)
    both = (a @ a.T) * (b @ b.T)
    return both.view(heads, width, heads, width).sum((1, 3))


def _cosine(products: Tensor) -> Tensor:
    norm = products.diagonal().clamp(min=TINY).sqrt()
    return products / norm[:, None] / norm


def _top_square(output: Tensor, value: Tensor) -> Tensor:
    """Square of the largest singular value of output @ value, (N, s) and (s, D)."""
    # the triangles of the QR decompositions have the same singular values and are small
    left, right = torch.linalg.qr(output).R, torch.linalg.qr(value.T).R
    return torch.linalg.matrix_norm(left @ right.T, 2).square()


# --------------------------------------------------------------------------------------------- anisotropic covariates
@dataclasses.dataclass
class Preconditioner:
    """The matrix sum_h mu_h KQ_h of a layer, which debiased gradient descent multiplies x_q with.

    Attributes:
        to_optimal: cosine with :func:`.regression.optimal_preconditioner`.
        to_identity: cosine with I, what plain gradient descent has.
        variances: (d,) eigenvalues of Sigma, rising.
        gains: (d,) what the layer multiplies those directions with; optimal: what it should.
        optimal: see gains.
    """

    to_optimal: float
    to_identity: float
    variances: Tensor
    gains: Tensor
    optimal: Tensor


def preconditioner(kq: Tensor, ov: Tensor, task: Regression) -> Preconditioner:
    """Read it from the matrices of one layer, (H, D, D) and (H, 1, D)."""
    d = task.d
    whole = (ov[:, 0, d, None, None].double() * kq[:, :d, :d].double()).sum(0)
    best = optimal_preconditioner(task)
    variances, axes = torch.linalg.eigh(task.covariance())

    def gains(matrix: Tensor) -> Tensor:
        return (axes.T @ matrix @ axes).diagonal()

    return Preconditioner(_angle(whole, best), _angle(whole, torch.eye(d, dtype=torch.float64)), variances,
                          gains(whole), gains(best))


def _angle(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=TINY))


# ------------------------------------------------------------------------------------------------------ several tasks
@dataclasses.dataclass
class TaskSpecialisation:
    """How far each head of one layer serves one task alone.

    Attributes:
        part: (H, N) part of task t in head h, |mu_ht| over its sum over tasks.
        weight: (H,) the head's sum of |OV| times its sum of |KQ|, over the sum over heads.
        from_values: mean over heads, by weight, of sum_t |mu_ht| over the sum of |OV|: 1 where y is made of y alone. A
            task of few covariates may be solved the other way about, with y in KQ and the covariates in OV; that gives
            0, and no head of that kind counts as dedicated.
        dedicated: the same of the largest |mu_ht|: 1 where each head serves one task, 1 / N where each serves all
            alike.
        shared_heads: heads with at least a tenth of the weight whose largest part is below 0.9.
    """

    part: Tensor
    weight: Tensor
    from_values: float
    dedicated: float
    shared_heads: int


def task_specialisation(kq: Tensor, ov: Tensor, d: int) -> TaskSpecialisation:
    """Read it from the matrices of one layer, (H, D, D) and (H, N, D)."""
    part = allocation(ov, d)
    whole = ov.abs().sum((1, 2))
    weight = whole * kq.abs().sum((1, 2))
    weight = weight / weight.sum().clamp(min=TINY)
    values = ov[..., d:].diagonal(dim1=-2, dim2=-1).abs() / whole[:, None].clamp(min=TINY)
    return TaskSpecialisation(part, weight, float((weight * values.sum(-1)).sum()),
                              float((weight * values.max(-1).values).sum()),
                              int(((weight >= 0.1) & (part.max(-1).values < 0.9)).sum()))


def allocation(ov: Tensor, d: int) -> Tensor:
    """How the heads share several tasks: (H, N) part of task t in head h, |mu_ht| over its sum over tasks.

    Args:
        ov: (H, N, d + N).
        d: number of covariates.
    """
    mu = ov[..., d:].diagonal(dim1=-2, dim2=-1).abs()
    return mu / mu.sum(-1, keepdim=True).clamp(min=TINY)


__all__ = ["LIMITS", "Invariants", "Preconditioner", "Signature", "TaskSpecialisation", "allocation", "head_signature",
           "invariants", "preconditioner", "task_specialisation"]
