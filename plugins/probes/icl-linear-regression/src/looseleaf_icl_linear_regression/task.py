"""The data: sequences of points of a linear function that is drawn anew for each sequence (section 2)."""

from __future__ import annotations

import dataclasses
import math
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
        def check(field: str, ok: bool, allowed: str) -> None:
            if not ok:
                raise ValueError(f"Regression.{field}={getattr(self, field)!r}: allowed is {allowed}")

        check("d", isinstance(self.d, int) and self.d >= 2, "a whole number from 2")
        check("L", isinstance(self.L, int) and self.L >= 2, "a whole number from 2")
        check("sigma2", 0 <= self.sigma2 < math.inf, "a number from 0")
        check("rho", -1 < self.rho < 1, "a number above -1 and below 1")
        check("supports", all(s and len(set(s)) == len(s) and set(s) <= set(range(self.d)) for s in self.supports),
              f"tuples of different covariates from 0 to {self.d - 1}, none of them empty")

    @property
    def tasks(self) -> int:
        """Number of tasks, N."""
        return max(1, len(self.supports))

    @property
    def width(self) -> int:
        """Rows of Z, d + N."""
        return self.d + self.tasks

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


__all__ = ["Regression", "Sequences"]
