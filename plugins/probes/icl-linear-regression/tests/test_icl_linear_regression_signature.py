"""The scores: perfect on the construction, far off on random weights, and blind to the basis where they say so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from looseleaf_icl_linear_regression import head_signature, invariants, opposite_heads
from looseleaf_icl_linear_regression.regression import Regression, optimal_preconditioner
from looseleaf_icl_linear_regression.signature import allocation, preconditioner, task_specialisation
from looseleaf_icl_linear_regression.training import Weights, constructed, initial_weights


def exact(weights: Weights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The factors with the query's value column taken out."""
    visible = torch.ones(weights.query.shape[-1], dtype=weights.query.dtype)
    visible[-1] = 0
    return weights.key, weights.query * visible, weights.value, weights.output


def test_constructed_heads_score_exactly() -> None:
    weights = opposite_heads(5, 0.1, 4.0)
    found = head_signature(weights.kq(), weights.ov())
    torch.testing.assert_close(found.omega, torch.tensor([0.1, -0.1], dtype=torch.float64))
    torch.testing.assert_close(found.mu, torch.tensor([4.0, -4.0], dtype=torch.float64))
    for name in ("off_diagonal", "variation", "value_row", "zero_sum"):
        assert found.mean(name) == pytest.approx(0, abs=1e-12)
    assert found.mean("last_entry") == 1.0 and found.fails() == []
    free = invariants(*exact(weights), rank=5)
    torch.testing.assert_close(free.isotropy, torch.tensor([1.0, -1.0], dtype=torch.float64))
    torch.testing.assert_close(free.rank_one, torch.ones(2, dtype=torch.float64))
    assert free.zero_sum == pytest.approx(0, abs=1e-7) and free.opposite == pytest.approx(1) and free.pair == (0, 1)


def test_random_weights_fail() -> None:
    for seed in range(5):
        weights = initial_weights(5, 4, 1, torch.Generator().manual_seed(seed))
        assert len(head_signature(weights.kq(), weights.ov()).fails()) >= 3
        free = invariants(*exact(weights), rank=5)
        assert float(free.isotropy.abs().mean()) < 0.6 and free.opposite < 0.9


def test_each_fault_shows_in_its_score() -> None:
    base = opposite_heads(5, 0.1, 4.0)
    kq, ov = base.kq(), base.ov()
    off = kq.clone()
    off[0, 0, 1] += 1.0
    assert head_signature(off, ov).fails() == ["off_diagonal"]
    uneven = kq.clone()
    uneven[:, 0, 0] *= 3
    assert head_signature(uneven, ov).fails() == ["variation"]
    leak = ov.clone()
    leak[:, 0, 0] = 1.0
    assert head_signature(kq, leak).fails() == ["last_entry"]
    same = constructed([0.1, 0.1], [4.0, 4.0], 5)
    assert head_signature(same.kq(), same.ov()).fails() == ["zero_sum"]
    assert head_signature(same.kq(), same.ov()).fails(zero_sum=False) == []
    row = kq.clone()
    row[:, 5, :5] = 0.1
    assert head_signature(row, ov).mean("value_row") == pytest.approx(1.0)


def test_a_dead_head_does_not_count() -> None:
    weights = constructed([0.1, -0.1, 0.0], [4.0, -4.0, 0.0], 5)
    kq, ov = weights.kq().clone(), weights.ov().clone()
    kq[2] = 1e-6 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    ov[2] = 1e-6 * torch.randn(1, 6, generator=torch.Generator().manual_seed(1))
    found = head_signature(kq, ov)
    assert found.fails() == [] and float(found.weight[2]) < 1e-9


def test_all_rows_of_ov_may_be_given() -> None:
    weights = opposite_heads(5, 0.1, 4.0)
    whole = torch.zeros(2, 6, 6, dtype=torch.float64)
    whole[:, 5] = weights.ov()[:, 0]
    assert head_signature(weights.kq(), whole).fails() == []


def test_invariants_do_not_see_a_rotation() -> None:
    generator = torch.Generator().manual_seed(0)
    key, query, value = (torch.randn(4, 3, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    output = torch.randn(4, 8, 3, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    one = invariants(key, query, value, output)
    two = invariants(key @ turn, query @ turn, value @ turn, turn.T @ output)
    torch.testing.assert_close(one.isotropy, two.isotropy)
    torch.testing.assert_close(one.rank_one, two.rank_one)
    assert one.zero_sum == pytest.approx(two.zero_sum) and one.opposite == pytest.approx(two.opposite)
    # and agree with what the full matrices say
    kq, ov = key.mT @ query, output @ value
    trace = kq.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(one.isotropy, trace / (3 ** 0.5 * kq.flatten(1).norm(dim=1)))
    singular = torch.linalg.svdvals(ov)
    torch.testing.assert_close(one.rank_one, singular[:, 0] ** 2 / (singular ** 2).sum(1))
    assert one.zero_sum == pytest.approx(float(ov.sum(0).norm() / ov.flatten(1).norm(dim=1).sum()))
    a, b = one.pair or (0, 0)
    cosines = [torch.nn.functional.cosine_similarity(m[a].flatten(), m[b].flatten(), 0) for m in (kq, ov)]
    assert one.opposite == pytest.approx(-float(max(cosines)))
    projection = turn[:3]
    assert float(invariants(projection[None], -2 * projection[None], value[:1], output[:1]).isotropy) \
        == pytest.approx(-1)
    assert invariants(key[:1], query[:1], value[:1], output[:1]).pair is None


def test_without_a_value_coordinate() -> None:
    kq = torch.stack([torch.eye(6), -torch.eye(6)])
    ov = torch.zeros(2, 6, 6)
    ov[0, 2, 3], ov[1, 2, 3] = 5.0, -5.0
    found = head_signature(kq, ov, values=0)
    assert found.fails() == []
    assert found.mu.tolist() == [5.0, -5.0]


def test_allocation() -> None:
    ov = torch.zeros(2, 2, 6)
    ov[0, 0, 4], ov[1, 0, 4], ov[1, 1, 5] = 2.0, 1.0, -3.0
    torch.testing.assert_close(allocation(ov, 4), torch.tensor([[1.0, 0.0], [0.25, 0.75]]))


def test_anisotropic_covariates_and_several_tasks() -> None:
    task = Regression(rho=0.5)
    best = optimal_preconditioner(task)
    kq = torch.zeros(2, 6, 6, dtype=torch.float64)
    kq[0, :5, :5], kq[1, :5, :5] = best / 20, -best / 20
    ov = torch.zeros(2, 1, 6, dtype=torch.float64)
    ov[:, 0, 5] = torch.tensor([10.0, -10.0])
    read = preconditioner(kq, ov, task)
    assert read.to_optimal == pytest.approx(1) and read.to_identity < 0.95
    torch.testing.assert_close(read.gains, read.optimal)
    assert bool((read.gains.diff() < 0).all())
    kq, ov = torch.eye(7).expand(4, 7, 7).clone(), torch.zeros(4, 2, 7)
    ov[0, 0, 5], ov[1, 0, 5], ov[2, 1, 6], ov[3, 1, 6] = 1, -1, 2, -2
    one = task_specialisation(kq, ov, 5)
    assert one.dedicated == pytest.approx(1) and one.shared_heads == 0
    assert one.from_values == pytest.approx(1)
    ov[0, 1, 6] = 1
    assert task_specialisation(kq, ov, 5).shared_heads == 1
    about = torch.zeros(4, 2, 7)
    about[:, 0, 0], about[:, 0, 5] = 5.0, 1e-3  # y in KQ, covariates in OV
    other = task_specialisation(torch.eye(7).flip(0).expand(4, 7, 7), about, 5)
    assert other.from_values < 0.01 and other.dedicated < 0.01


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"expected \(H, D, D\)"):
        head_signature(torch.zeros(2, 6, 5), torch.zeros(2, 1, 6))
    with pytest.raises(ValueError, match=r"expected \(H, D, D\)"):
        head_signature(torch.zeros(2, 6, 6), torch.zeros(3, 1, 6))
    with pytest.raises(ValueError, match=r"values: expected an integer in \[0, 4\] for D = 6, got 6"):
        head_signature(torch.zeros(2, 6, 6), torch.zeros(2, 6, 6), values=6)
    with pytest.raises(ValueError, match="not finite"):
        head_signature(torch.full((2, 6, 6), torch.nan), torch.zeros(2, 1, 6))
