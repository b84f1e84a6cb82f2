"""In-context linear regression (section 2): the sequences, and the predictors that have closed forms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """A batch of sequences; any number of leading dimensions may stand before B.

    Attributes:
        context: (B, L, d + N) columns (x_l, y_l) of Z, one a row.
        query: (B, d + N), the query column (x_q, 0).
        target: (B, N), beta . x_q without noise. The risk on a noisy y_q is larger by sigma^2 for each task.
    """

    context: Tensor
    query: Tensor
    target: Tensor


@dataclasses.dataclass(frozen=True)
class Regression:
    """In-context linear regression: x ~ N(0, Sigma), beta ~ N(0, I / d), y = beta . x + noise.

    Args:
        d: number of covariates.
        L: points in a context.
        sigma2: variance of the noise.
        rho: Sigma_ij = rho^|i - j|; 0 for isotropic covariates.
        supports: the covariates that each task uses, one tuple for each task; empty for one task that uses all. The
            coefficients of a task that uses k covariates have variance 1 / k.

    Raises:
        ValueError: a value out of range.
    """

    d: int = 5
    L: int = 40
    sigma2: float = 0.1
    rho: float = 0.0
    supports: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        supports = f"tuples of different covariates from 0 to {self.d - 1}, none of them empty"
        for field, ok, expected in (
                ("d", isinstance(self.d, int) and self.d >= 2, "an integer >= 2"),
                ("L", isinstance(self.L, int) and self.L >= 2, "an integer >= 2"),
                ("sigma2", 0 <= self.sigma2 < math.inf, "a number >= 0"),
                ("rho", -1 < self.rho < 1, "a number in (-1, 1)"),
                ("supports", all(s and len(set(s)) == len(s) and set(s) <= set(range(self.d)) for s in self.supports),
                 supports)):
            if not ok:
                raise ValueError(f"Regression.{field}: expected {expected}, got {getattr(self, field)!r}")

    @property
    def tasks(self) -> int:
        """Number of tasks, N."""
        return max(1, len(self.supports))

    def covariance(self) -> Tensor:
        """Sigma, (d, d), float64."""
        index = torch.arange(self.d, dtype=torch.float64)
        return torch.tensor(self.rho, dtype=torch.float64) ** (index[:, None] - index).abs()

    def sample(self, batch: int, generator: torch.Generator, *, length: int | None = None,
               dtype: torch.dtype = torch.float32) -> Sequences:
        """``batch`` sequences of ``length`` points (None: L), drawn from ``generator`` alone."""
        length = self.L if length is None else length
        x = torch.randn(batch, length + 1, self.d, generator=generator, dtype=dtype)
        if self.rho:
            x = x @ torch.linalg.cholesky(self.covariance()).to(dtype).T
        beta = torch.randn(batch, self.d, self.tasks, generator=generator, dtype=dtype)
        y = x @ (beta * self._deviations().to(dtype))
        noise = torch.randn(batch, length, self.tasks, generator=generator, dtype=dtype)
        context = torch.cat([x[:, :-1], y[:, :-1] + math.sqrt(self.sigma2) * noise], -1)
        return Sequences(context, torch.cat([x[:, -1], torch.zeros_like(y[:, -1])], -1), y[:, -1])

    def _deviations(self) -> Tensor:
        """(d, N) standard deviations of the coefficients."""
        out = torch.zeros(self.d, self.tasks, dtype=torch.float64)
        for task, support in enumerate(self.supports or (tuple(range(self.d)),)):
            out[list(support), task] = len(support) ** -0.5
        return out


# --------------------------------------------------------------------------------------------------------- predictors
def vanilla_gd(x: Tensor, y: Tensor, query: Tensor, step: float) -> Tensor:
    """One step of gradient descent from zero on the squared error.

    Args:
        x: (..., L, d). y: (..., L). query: (..., d).
        step: its length; that of the least risk is :func:`optimal_step`.

    Returns:
        (...): (step / L) sum_l y_l x_l . x_q.
    """
    return step * torch.einsum("...l,...ld,...d->...", y, x, query) / x.shape[-2]


def debiased_gd(x: Tensor, y: Tensor, query: Tensor, step: float) -> Tensor:
    """The same with the mean of y taken away first: (step / L) sum_l (y_l - mean(y)) x_l . x_q (section 3)."""
    return vanilla_gd(x, y - y.mean(-1, keepdim=True), query, step)


def ridge(x: Tensor, y: Tensor, query: Tensor, penalty: float) -> Tensor:
    """x_q . (X^T X + penalty I)^-1 X^T y, the Bayes predictor for ``penalty`` = d sigma^2.

    Raises:
        ValueError: a negative penalty.
    """
    if not penalty >= 0:
        raise ValueError(f"penalty: expected a number >= 0 (d sigma^2 is Bayes-optimal), got {penalty}")
    gram = x.transpose(-1, -2) @ x + penalty * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    beta = torch.linalg.solve(gram, (x.transpose(-1, -2) @ y[..., None]))[..., 0]
    return (beta * query).sum(-1)


def softmax_predictor(omega: Sequence[float], mu: Sequence[float], x: Tensor, y: Tensor, query: Tensor) -> Tensor:
    """What heads with the signature compute: sum_h mu_h sum_l y_l softmax_l(omega_h x_l . x_q)."""
    similarity = (x @ query[..., None])[..., 0]
    return sum((m * (y * torch.softmax(o * similarity, -1)).sum(-1) for o, m in zip(omega, mu, strict=True)),
               torch.zeros_like(query[..., 0]))


def optimal_step(task: Regression, debiased: bool = True) -> float:
    """The step of least risk for isotropic covariates; debiased: 1 / (1 + d (1 + sigma^2) / L).

    Two opposite heads take a step of 2 mu omega. Exact: the second moment of a Wishart matrix, which has L - 1 degrees
    of freedom where the mean was taken away and L where it was not.
    """
    return task.L / (task.L + task.d * (1 + task.sigma2) + (0 if debiased else 1))


def gd_risk(task: Regression, debiased: bool = True) -> float:
    """Risk of :func:`debiased_gd` or :func:`vanilla_gd` at the optimal step on a noisy y_q, isotropic, exact."""
    degrees = task.L - 1 if debiased else task.L
    return 1 + task.sigma2 - degrees / (degrees + 1 + task.d * (1 + task.sigma2))


def optimal_preconditioner(task: Regression) -> Tensor:
    """The matrix A of least risk in x_q . A (1 / L) sum_l (y_l - mean(y)) x_l, for any covariance; (d, d), float64.

    A = ((n^2 + n) / L^2 Sigma + (n tr(Sigma) / L^2 + d sigma^2 n / L^2) I)^-1 n / L with n = L - 1: nearly Sigma^-1,
    pulled towards the identity where the context is short. For Sigma = I it is :func:`optimal_step` times I.
    """
    sigma, n, length = task.covariance(), task.L - 1, task.L
    eye = torch.eye(task.d, dtype=torch.float64)
    inverse = (n * n + n) * sigma + n * (sigma.trace() + task.d * task.sigma2) * eye
    return n * length * torch.linalg.inv(inverse)


__all__ = ["Regression", "Sequences", "debiased_gd", "gd_risk", "optimal_preconditioner", "optimal_step", "ridge",
           "softmax_predictor", "vanilla_gd"]
