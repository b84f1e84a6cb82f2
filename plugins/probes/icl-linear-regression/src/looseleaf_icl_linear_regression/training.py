"""One layer of multi-head attention, and its gradient-based training from random weights, all seeds at once.

The layer is given by its effective matrices KQ_h = K_h^T Q_h and OV_h = O_h V_h (section 2).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from looseleaf import progress as progress_
from looseleaf.errors import did_you_mean
from looseleaf.modes import with_gradients
from looseleaf_icl_linear_regression.regression import Regression, Sequences

KINDS = ("softmax", "linear")
CHECKS = 24
"""How often it is measured in a training."""
SETTLED, LEARNED = 0.01, 0.9
"""Converged: from the third to the fourth sixth of the steps, all at the full learning rate, the mean loss falls by
less than the first part, and it is below the second part of that of predicting 0."""


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
        raise ValueError(f"expected as many omega as mu, at least one, got {len(omega)} and {len(mu)}")
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
        raise ValueError(f"attention: expected {' or '.join(KINDS)}, got {attention!r}."
                         f"{did_you_mean(attention, KINDS)}")
    heads, tasks, size = ov.shape[-3:]
    directions = data.query @ kq.flatten(-3, -2).transpose(-1, -2)  # rows KQ_h z_q, heads side by side
    scores = data.context @ directions.unflatten(-1, (heads, size)).transpose(-1, -2)  # (..., B, L, H)
    if attention == "softmax":
        weights = torch.softmax(scores, -2)
    else:
        weights = scores / (data.context.shape[-2] if normaliser is None else normaliser)
    values = (data.context @ ov.flatten(-3, -2).transpose(-1, -2)[..., None, :, :]).unflatten(-1, (heads, tasks))
    return (weights[..., None] * values).sum((-3, -2))


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
        for key, query_, value, output in zip(*weights, strict=True):
            scores = (z.T @ key.T @ query_ @ z)[:, -1]
            column += output @ value @ z @ torch.softmax(scores.masked_fill(~visible, -torch.inf), 0)
        out.append(column)
    return torch.stack(out)


# ----------------------------------------------------------------------------------------------------------- training
@dataclasses.dataclass
class Trained:
    """What training gave, for S seeds.

    Attributes:
        task: what was learned.
        attention: ``softmax`` or ``linear``.
        seeds: of the rows of everything below.
        weights: the matrices, with a leading dimension S.
        steps: at which the risk was measured.
        losses: (S, len(steps)) mean loss of the steps since the measurement before, on the sequences of the training,
            all of them fresh. At the full learning rate it is far steadier than the risk of the weights of one step.
        risks: (S, len(steps)) risk on validation sequences. Both with the noise of y_q, sum over tasks.
        omegas, mus: (S, len(steps), H) mean diagonal of KQ, and last entry of OV, of the first task.
    """

    task: Regression
    attention: str
    seeds: tuple[int, ...]
    weights: Weights
    steps: list[int]
    losses: Tensor
    risks: Tensor
    omegas: Tensor
    mus: Tensor

    def kq(self, seed: int | None = None) -> Tensor:
        """KQ of one row (H, D, D), or of all (S, H, D, D), in double precision."""
        kq = self.weights.kq().double()
        return kq if seed is None else kq[seed]

    def ov(self, seed: int | None = None) -> Tensor:
        """The last rows of OV, (H, N, D) or (S, H, N, D), in double precision."""
        ov = self.weights.ov().double()
        return ov if seed is None else ov[seed]

    def converged(self) -> list[bool]:
        """For each seed: whether the loss had settled before the learning rate fell, see :data:`SETTLED`.

        A saddle or a local minimum looks settled too: compare the risk with that of debiased gradient descent.
        """
        third, fourth = (self.losses[:, CHECKS * i // 6:CHECKS * (i + 1) // 6].mean(1) for i in (2, 3))
        nothing = (1 + self.task.sigma2) * self.task.tasks
        return ((fourth > (1 - SETTLED) * third) & (fourth < LEARNED * nothing)).tolist()

    def opposite(self) -> list[bool]:
        """For each seed: whether there are heads with omega above 0 and others below that share the weight.

        The smaller side has at least a tenth of the sum of |mu omega|. Heads on one side alone are the single-head
        solution, in which two heads can stay for good.
        """
        omega, mu = self.omegas[:, -1], self.mus[:, -1]
        weight = (omega * mu).abs()
        above = (weight * (omega > 0)).sum(1) / weight.sum(1)
        return (torch.minimum(above, 1 - above) >= 0.1).tolist()


@with_gradients()
def train(task: Regression, heads: int, seeds: Sequence[int] = (0,), *, attention: str = "softmax", steps: int = 6000,
          lr: float = 0.01, batch: int = 256, validation: int = 4096, progress: bool | None = None) -> Trained:
    """Adam on the squared error of y_q, every step on fresh sequences.

    The learning rate is constant for two thirds of the steps and falls to zero along a cosine in the rest. All seeds
    are computed side by side; each has random numbers of its own for its start and its sequences, so that what one seed
    learns does not depend on the others.

    Args:
        task: the data.
        heads: H.
        seeds: one model each.
        attention: ``softmax`` or ``linear`` (scores over L in place of the softmax).
        steps, lr, batch: of the optimiser; ``batch`` sequences a step and seed.
        validation: sequences that the risk is followed on, the same for all seeds.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: a value out of range, or a loss that is not finite.
    """
    for name, value, least in (("heads", heads, 1), ("steps", steps, CHECKS), ("batch", batch, 1),
                               ("validation", validation, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
    if not len(seeds) or not all(isinstance(seed, int) for seed in seeds):
        raise ValueError(f"seeds: expected one integer or more, got {seeds!r}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr: expected a number > 0, got {lr!r}")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    starts = [initial_weights(task.d, heads, task.tasks, g) for g in generators]
    weights = Weights(*(torch.stack(parts).requires_grad_() for parts in zip(*starts, strict=True)))
    held_out = task.sample(validation, torch.Generator().manual_seed(2 ** 31))
    optimizer = torch.optim.Adam(weights, lr=lr)
    none = torch.zeros(len(seeds), 0)
    trained = Trained(task, attention, tuple(seeds), weights, [], none, none, none[:, :, None].expand(-1, -1, heads),
                      none[:, :, None].expand(-1, -1, heads))
    sums = torch.zeros(len(seeds))
    checks = {round(steps * (i + 1) / CHECKS) for i in range(CHECKS)}
    with progress_.bar(f"{heads} heads, {attention}", steps, progress) as progress_bar:
        for step in range(1, steps + 1):
            data = _stack([task.sample(batch, g) for g in generators])
            for group in optimizer.param_groups:
                group["lr"] = lr * _rate(step / steps)
            optimizer.zero_grad()
            error = predict(weights.kq(), weights.ov(), data, attention, task.L) - data.target
            loss = error.square().sum(-1).mean(-1)
            loss.sum().backward()
            optimizer.step()
            sums += loss.detach()
            if step in checks:
                _check(trained, held_out, step, sums)
                sums.zero_()
            progress_bar.update()
    trained.weights = Weights(*(w.detach() for w in weights))
    return trained


def risk(kq: Tensor, ov: Tensor, task: Regression, data: Sequences, attention: str = "softmax",
         normaliser: float | None = None) -> Tensor:
    """Mean squared error on a noisy y_q, sum over tasks, (...) for matrices with leading dimensions.

    The noise of y_q adds sigma^2 for each task; it is added as that number, so that only the rest is estimated.
    """
    total = torch.zeros(kq.shape[:-3], dtype=torch.float64)
    for start in range(0, len(data.target), 1024):
        part = Sequences(*(x[start:start + 1024].to(kq) for x in data))
        total += (predict(kq, ov, part, attention, normaliser) - part.target).square().sum((-2, -1)).double()
    return total / len(data.target) + task.sigma2 * task.tasks


def _check(trained: Trained, held_out: Sequences, step: int, sums: Tensor) -> None:
    with torch.no_grad():
        kq, ov = trained.weights.kq(), trained.weights.ov()
        now = risk(kq, ov, trained.task, held_out, trained.attention, trained.task.L)
        if not bool(torch.isfinite(now).all()):
            raise ValueError(f"the risk is not finite after {step} steps: choose a smaller lr")
        d = trained.task.d
        omega = kq.diagonal(dim1=-2, dim2=-1)[..., :d].mean(-1)
        loss = sums / (step - (trained.steps[-1] if trained.steps else 0)) + trained.task.sigma2 * trained.task.tasks
        trained.steps.append(step)
        trained.losses = torch.cat([trained.losses, loss[:, None]], 1)
        trained.risks = torch.cat([trained.risks, now[:, None].to(trained.risks)], 1)
        trained.omegas = torch.cat([trained.omegas, omega[:, None]], 1)
        trained.mus = torch.cat([trained.mus, ov[:, None, :, 0, d]], 1)


def _rate(fraction: float) -> float:
    """Learning rate after this fraction of the steps, relative to the first."""
    return 1.0 if fraction <= 2 / 3 else (1 + math.cos(math.pi * (3 * fraction - 2))) / 2


def _stack(parts: list[Sequences]) -> Sequences:
    return Sequences(*(torch.stack(same) for same in zip(*parts, strict=True)))


__all__ = ["CHECKS", "Trained", "Weights", "constructed", "initial_weights", "opposite_heads", "predict",
           "predict_reference", "risk", "train"]
