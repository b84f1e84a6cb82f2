"""Gradient-based training from random weights, all seeds at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from looseleaf import progress as progress_
from looseleaf_icl_linear_regression.task import Regression, Sequences
from looseleaf_icl_linear_regression.transformer import Weights, initial_weights, predict

CHECKS = 24
"""How often it is measured in a training."""
SETTLED, LEARNED = 0.01, 0.9
"""Converged: from the third to the fourth sixth of the steps, all at the full learning rate, the mean loss falls by
less than the first part, and it is below the second part of that of predicting 0."""


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
    for name, value, ok, allowed in (
            ("heads", heads, isinstance(heads, int) and heads >= 1, "a whole number from 1"),
            ("seeds", seeds, len(seeds) >= 1 and all(isinstance(s, int) for s in seeds), "one or more whole numbers"),
            ("steps", steps, isinstance(steps, int) and steps >= CHECKS, f"a whole number from {CHECKS}"),
            ("lr", lr, 0 < lr < math.inf, "a number above 0"),
            ("batch", batch, isinstance(batch, int) and batch >= 1, "a whole number from 1"),
            ("validation", validation, isinstance(validation, int) and validation >= 1, "a whole number from 1")):
        if not ok:
            raise ValueError(f"{name}={value!r}: allowed is {allowed}")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    starts = [initial_weights(task.d, heads, task.tasks, g) for g in generators]
    weights = Weights(*(torch.stack(parts).requires_grad_() for parts in zip(*starts, strict=True)))
    held_out = task.sample(validation, torch.Generator().manual_seed(2 ** 31))
    optimizer = torch.optim.Adam(weights, lr=lr)
    none = torch.zeros(len(seeds), 0)
    found = Trained(task, attention, tuple(seeds), weights, [], none, none, none[:, :, None].expand(-1, -1, heads),
                    none[:, :, None].expand(-1, -1, heads))
    sums = torch.zeros(len(seeds))
    checks = {round(steps * (i + 1) / CHECKS) for i in range(CHECKS)}
    with progress_.bar(f"{heads} heads, {attention}", steps, progress) as moving, torch.enable_grad():
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
                _check(found, held_out, step, sums)
                sums.zero_()
            moving.update()
    found.weights = Weights(*(w.detach() for w in weights))
    return found


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


def _check(found: Trained, held_out: Sequences, step: int, sums: Tensor) -> None:
    with torch.no_grad():
        kq, ov = found.weights.kq(), found.weights.ov()
        now = risk(kq, ov, found.task, held_out, found.attention, found.task.L)
        if not bool(torch.isfinite(now).all()):
            raise ValueError(f"the risk is not finite after {step} steps: choose a smaller lr")
        d = found.task.d
        omega = kq.diagonal(dim1=-2, dim2=-1)[..., :d].mean(-1)
        loss = sums / (step - (found.steps[-1] if found.steps else 0)) + found.task.sigma2 * found.task.tasks
        found.steps.append(step)
        found.losses = torch.cat([found.losses, loss[:, None]], 1)
        found.risks = torch.cat([found.risks, now[:, None].to(found.risks)], 1)
        found.omegas = torch.cat([found.omegas, omega[:, None]], 1)
        found.mus = torch.cat([found.mus, ov[:, None, :, 0, d]], 1)


def _rate(part: float) -> float:
    """Learning rate at this part of the steps, relative to the first."""
    return 1.0 if part <= 2 / 3 else (1 + math.cos(math.pi * (3 * part - 2))) / 2


def _stack(parts: list[Sequences]) -> Sequences:
    return Sequences(*(torch.stack(same) for same in zip(*parts, strict=True)))


__all__ = ["Trained", "risk", "train"]
