"""The paper's experiments at small scale: what is trained, and what is measured on test sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from looseleaf_icl_linear_regression import predictors
from looseleaf_icl_linear_regression.signature import TINY, Signature, allocation, head_signature
from looseleaf_icl_linear_regression.task import Regression, Sequences
from looseleaf_icl_linear_regression.training import Trained, risk, train

OVERLAPPING = ((0, 1, 2), (1, 2, 3, 4))
"""Two tasks with three and four of five covariates, as in the authors' code."""
DISJOINT = ((0, 1), (2, 3, 4))
TEST_SEED = 10 ** 6
"""Test sequences come from this seed and up, which no training uses."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is trained and measured.

    Attributes:
        steps: of the trainings with one head, two heads, four heads, linear attention, anisotropic covariates, and
            several tasks.
        many: seeds of the count of starts that end with heads on one side, and its steps.
        test: test sequences of each seed and length.
        batch: sequences a step.
        validation: sequences that the risk is followed on.
    """

    one: int = 4000
    two: int = 12000
    four: int = 10000
    linear: int = 4000
    anisotropic: int = 10000
    several: int = 10000
    many: int = 20
    many_steps: int = 4000
    test: int = 10000
    batch: int = 256
    validation: int = 4096


QUICK = Scale(48, 48, 48, 48, 48, 48, 3, 48, 200, 32, 128)


def signatures(trained: Trained) -> list[Signature]:
    """One for each seed."""
    return [head_signature(trained.kq(i), trained.ov(i), trained.task.tasks) for i in range(len(trained.seeds))]


def heldout_risks(trained: Trained, lengths: Sequence[int], count: int, *, own_length: bool = False) -> Tensor:
    """(S, len(lengths)) risk of each seed's layer on test sequences of its own.

    Args:
        trained: the layers.
        lengths: of the contexts.
        count: sequences for each.
        own_length: linear attention divides by the length at hand in place of the one it was trained at.
    """
    rows = []
    for i, seed in enumerate(trained.seeds):
        rows.append(torch.stack([
            risk(trained.kq(i), trained.ov(i), trained.task, sequences(trained.task, seed, length, count),
                 trained.attention, None if own_length else trained.task.L) for length in lengths]))
    return torch.stack(rows)


def sequences(task: Regression, seed: int, length: int, count: int) -> Sequences:
    """The test sequences of a seed."""
    return task.sample(count, torch.Generator().manual_seed(TEST_SEED + seed), length=length)


def baseline_risks(task: Regression, seed: int, count: int) -> dict[str, float]:
    """Risks of the predictors on the test sequences of a seed, isotropic covariates, one task."""
    data = Sequences(*(x.double() for x in sequences(task, seed, task.L, count)))
    x, y, query = data.context[..., :-1], data.context[..., -1], data.query[..., :-1]
    found = {
        "gradient descent": predictors.vanilla_gd(x, y, query, predictors.optimal_step(task, debiased=False)),
        "debiased gradient descent": predictors.debiased_gd(x, y, query, predictors.optimal_step(task)),
        "ridge (Bayes)": predictors.ridge(x, y, query, task.d * task.sigma2),
    }
    return {name: float((f - data.target[:, 0]).square().mean()) + task.sigma2 for name, f in found.items()}


def ridge_ratio(d: int, sigma2: float, count: int, seed: int = 0) -> float:
    """Risk of debiased gradient descent, exact, over that of ridge, at L = 8 d."""
    task = Regression(d, 8 * d, sigma2)
    return predictors.gd_risk(task) / baseline_risks(task, seed, count)["ridge (Bayes)"]


# ---------------------------------------------------------------------------------------- anisotropic covariates
@dataclasses.dataclass
class Preconditioner:
    """The matrix sum_h mu_h KQ_h of a layer, which debiased gradient descent multiplies x_q with.

    Attributes:
        to_optimal: cosine with :func:`.predictors.optimal_preconditioner`.
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
    best = predictors.optimal_preconditioner(task)
    variances, axes = torch.linalg.eigh(task.covariance())

    def gains(matrix: Tensor) -> Tensor:
        return (axes.T @ matrix @ axes).diagonal()

    return Preconditioner(_cosine(whole, best), _cosine(whole, torch.eye(d, dtype=torch.float64)), variances,
                          gains(whole), gains(best))


def preconditioned_risks(task: Regression, seed: int, count: int) -> dict[str, float]:
    """Risks of debiased gradient descent, with the best preconditioner and with the best single step."""
    data = Sequences(*(x.double() for x in sequences(task, seed, task.L, count)))
    x, y, query = data.context[..., :-1], data.context[..., -1], data.query[..., :-1]
    turned = predictors.debiased_gd(x, y, query @ predictors.optimal_preconditioner(task), 1.0)
    plain = predictors.debiased_gd(x, y, query, 1.0)
    step = float((plain * data.target[:, 0]).sum() / plain.square().sum())
    ridge = predictors.ridge(x, y, query, task.d * task.sigma2)
    return {name: float((f - data.target[:, 0]).square().mean()) + task.sigma2 for name, f in (
        ("debiased gradient descent, preconditioned", turned), ("debiased gradient descent, one step size",
                                                                step * plain), ("ridge (Bayes)", ridge))}


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=TINY))


# ---------------------------------------------------------------------------------------- several tasks
@dataclasses.dataclass
class Sharing:
    """How the heads of one layer share the tasks.

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


def sharing(kq: Tensor, ov: Tensor, d: int) -> Sharing:
    """Read it from the matrices of one layer, (H, D, D) and (H, N, D)."""
    part = allocation(ov, d)
    whole = ov.abs().sum((1, 2))
    weight = whole * kq.abs().sum((1, 2))
    weight = weight / weight.sum().clamp(min=TINY)
    values = ov[..., d:].diagonal(dim1=-2, dim2=-1).abs() / whole[:, None].clamp(min=TINY)
    return Sharing(part, weight, float((weight * values.sum(-1)).sum()), float((weight * values.max(-1).values).sum()),
                   int(((weight >= 0.1) & (part.max(-1).values < 0.9)).sum()))


# ---------------------------------------------------------------------------------------- how often heads meet
def on_one_side(task: Regression, heads: int, scale: Scale, progress: bool | None) -> list[bool]:
    """For each of many starts: whether the heads ended on one side, the single-head solution."""
    found = train(task, heads, range(scale.many), steps=scale.many_steps, batch=min(64, scale.batch),
                  validation=min(1024, scale.validation), progress=progress)
    return [not opposite for opposite in found.opposite()]


__all__ = ["DISJOINT", "OVERLAPPING", "QUICK", "Preconditioner", "Scale", "Sharing", "baseline_risks", "heldout_risks",
           "on_one_side", "preconditioned_risks", "preconditioner", "ridge_ratio", "sequences", "sharing", "signatures"]
