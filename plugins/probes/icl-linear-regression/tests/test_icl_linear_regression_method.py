"""The layer, its predictors and its training against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from looseleaf_icl_linear_regression import (
    Regression,
    debiased_gd,
    head_signature,
    opposite_heads,
    optimal_step,
    predict,
    ridge,
    train,
    vanilla_gd,
)
from looseleaf_icl_linear_regression.regression import (
    Sequences,
    gd_risk,
    optimal_preconditioner,
    softmax_predictor,
)
from looseleaf_icl_linear_regression.training import Weights, constructed, initial_weights, predict_reference, risk

TASK = Regression()


def draw(task: Regression = TASK, count: int = 64, seed: int = 0, length: int | None = None) -> Sequences:
    return task.sample(count, torch.Generator().manual_seed(seed), length=length, dtype=torch.float64)


def points(data: Sequences) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return data.context[..., :-1], data.context[..., -1], data.query[..., :-1]


# ---------------------------------------------------------------------------------------------------------- data
def test_sequences_are_what_the_paper_draws() -> None:
    data = draw(Regression(d=3, L=20, sigma2=0.25, rho=0.5), 20000)
    x, y, query = points(data)
    covariance = x.flatten(0, 1).T @ x.flatten(0, 1) / x[..., 0].numel()
    torch.testing.assert_close(covariance, Regression(d=3, rho=0.5).covariance(), atol=0.02, rtol=0)
    assert float(covariance[0, 2]) == pytest.approx(0.25, abs=0.02)
    assert bool((data.query[:, -1] == 0).all())  # the query's value is hidden
    # y = beta . x + noise: with the coefficients recovered from the points, what remains has variance sigma^2
    beta = torch.linalg.lstsq(x, y[..., None]).solution
    rest = (y - (x @ beta)[..., 0]).square().sum() / (len(y) * (20 - 3))
    assert float(rest) == pytest.approx(0.25, rel=0.02)
    assert float(beta.square().mean()) == pytest.approx(1 / 3 + 0.25 / (20 - 3 - 1) * 4 / 3, rel=0.06)
    # the target has no noise
    exact = draw(Regression(d=3, L=20, sigma2=0.0), 50)
    x, y, query = points(exact)
    torch.testing.assert_close(ridge(x, y, query, 0.0), exact.target[:, 0])


def test_tasks_use_their_covariates_only() -> None:
    task = Regression(d=4, L=8, sigma2=0.0, supports=((0, 1), (1, 2, 3)))
    data = draw(task, 10)
    x, query = data.context[..., :4], data.query[..., :4]
    for t, support in enumerate(task.supports):
        found = ridge(x[..., list(support)], data.context[..., 4 + t], query[..., list(support)], 0.0)
        torch.testing.assert_close(found, data.target[:, t])


# --------------------------------------------------------------------------------------------------------- layer
@pytest.mark.parametrize("supports", [(), ((0, 1, 2), (1, 2, 3, 4))])
def test_fast_layer_is_the_paper_s(supports: tuple[tuple[int, ...], ...]) -> None:
    task = Regression(supports=supports)
    start = initial_weights(5, 3, task.tasks, torch.Generator().manual_seed(1))
    weights = Weights(*(3 * w.double() for w in start))
    data = draw(task, 16)
    torch.testing.assert_close(predict(weights.kq(), weights.ov(), data), predict_reference(weights, data))


def test_seeds_side_by_side_are_the_same_as_alone() -> None:
    weights = [initial_weights(5, 2, 1, torch.Generator().manual_seed(s)) for s in range(3)]
    data = [TASK.sample(8, torch.Generator().manual_seed(s)) for s in range(3)]
    both = predict(torch.stack([w.kq() for w in weights]), torch.stack([w.ov() for w in weights]),
                   Sequences(*(torch.stack(x) for x in zip(*data, strict=True))))
    for i in range(3):
        torch.testing.assert_close(both[i], predict(weights[i].kq(), weights[i].ov(), data[i]))


def test_the_hidden_column_changes_nothing() -> None:
    weights = initial_weights(5, 2, 1, torch.Generator().manual_seed(0))
    full = weights.key.transpose(-1, -2) @ weights.query
    data = TASK.sample(8, torch.Generator().manual_seed(0))
    torch.testing.assert_close(predict(full, weights.ov(), data), predict(weights.kq(), weights.ov(), data))
    assert bool((weights.kq()[..., -1] == 0).all()) and bool((full[..., -1] != 0).any())


# ------------------------------------------------------------------------------------------------- closed forms
def test_closed_form_predictor_is_the_layer_with_those_weights() -> None:
    omega, mu = [0.3, -0.2, 0.5], [1.5, -2.0, 0.4]
    weights = constructed(omega, mu, 5)
    data = draw()
    closed = softmax_predictor(omega, mu, *points(data))
    torch.testing.assert_close(predict(weights.kq(), weights.ov(), data)[:, 0], closed)
    torch.testing.assert_close(predict_reference(weights, data)[:, 0], closed)


def test_two_opposite_heads_are_debiased_gradient_descent() -> None:
    data = draw()
    step = optimal_step(TASK)
    exact = debiased_gd(*points(data), step)
    gaps = []
    for omega in (0.04, 0.02, 0.01):
        weights = opposite_heads(5, omega, step / (2 * omega))
        gaps.append(float((predict(weights.kq(), weights.ov(), data)[:, 0] - exact).norm() / exact.norm()))
    assert gaps[2] < 1e-3
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.05)  # the difference falls with omega^2
    assert gaps[1] / gaps[2] == pytest.approx(4, rel=0.05)


def test_a_single_head_is_a_biased_kernel_smoother() -> None:
    data = draw()
    x, y, _ = points(data)
    weights = constructed([0.5], [1.0], 5)
    shifted = Sequences(torch.cat([x, y[..., None] + 3], -1), data.query, data.target)
    torch.testing.assert_close(predict(weights.kq(), weights.ov(), shifted),
                               predict(weights.kq(), weights.ov(), data) + 3)


def test_debiased_does_not_see_a_constant_and_vanilla_does() -> None:
    x, y, query = points(draw())
    torch.testing.assert_close(debiased_gd(x, y + 7, query, 0.9), debiased_gd(x, y, query, 0.9))
    assert not torch.allclose(vanilla_gd(x, y + 7, query, 0.9), vanilla_gd(x, y, query, 0.9), atol=0.1)
    pair = softmax_predictor([0.3, -0.3], [2.0, -2.0], x, y, query)
    torch.testing.assert_close(softmax_predictor([0.3, -0.3], [2.0, -2.0], x, y + 7, query), pair)


def test_ridge_is_the_posterior_mean() -> None:
    x, y, query = points(draw(count=10))
    # condition the joint Gaussian of (beta, y) on y, with beta ~ N(0, I / d)
    among = x @ x.transpose(1, 2) / 5 + 0.1 * torch.eye(40, dtype=torch.float64)
    mean = (x.transpose(1, 2) / 5 @ torch.linalg.solve(among, y[..., None]))[..., 0]
    torch.testing.assert_close(ridge(x, y, query, 5 * 0.1), (mean * query).sum(1))


@pytest.mark.parametrize("debiased", [True, False])
def test_optimal_step_and_risk(debiased: bool) -> None:
    data = draw(count=60000)
    predictor = debiased_gd if debiased else vanilla_gd
    once = predictor(*points(data), 1.0)
    best = float((once * data.target[:, 0]).sum() / once.square().sum())
    assert optimal_step(TASK, debiased) == pytest.approx(best, rel=0.01)
    found = float((optimal_step(TASK, debiased) * once - data.target[:, 0]).square().mean()) + TASK.sigma2
    assert gd_risk(TASK, debiased) == pytest.approx(found, rel=0.02)
    assert optimal_step(TASK) == pytest.approx(1 / (1 + 5 * 1.1 / 40))


def test_optimal_preconditioner() -> None:
    torch.testing.assert_close(optimal_preconditioner(TASK), optimal_step(TASK) * torch.eye(5, dtype=torch.float64))
    task = Regression(d=3, L=12, rho=0.6)
    data = draw(task, 150000)
    x, y, query = points(data)
    moment = torch.einsum("bl,bld->bd", y - y.mean(1, keepdim=True), x) / 12
    # least squares of the target on all products x_q,i moment_j is the best matrix
    products = (query[:, :, None] * moment[:, None, :]).flatten(1)
    best = torch.linalg.lstsq(products, data.target).solution.view(3, 3)
    torch.testing.assert_close(optimal_preconditioner(task), best, atol=0.03, rtol=0.03)
    long = optimal_preconditioner(Regression(d=3, L=10 ** 6, rho=0.6))
    torch.testing.assert_close(long, torch.linalg.inv(task.covariance()), atol=1e-4, rtol=1e-4)


def approximate_risk(omega: torch.Tensor, mu: torch.Tensor, task: Regression) -> torch.Tensor:
    """The paper's approximation of the risk of heads with the signature, a scalar that can be differentiated.

    1 + sigma^2 - 2 mu . omega + mu^T (omega omega^T + (1 + sigma^2) / L exp(d omega omega^T)) mu, exp by entries. Other
    terms of order 1 / L are left out: at d = 5, L = 40 its least value is 0.221, where the exact risk of two opposite
    heads with small omega is 0.243.
    """
    outer = torch.outer(omega, omega)
    inner = outer + (1 + task.sigma2) / task.L * torch.exp(task.d * outer)
    return 1 + task.sigma2 - 2 * mu @ omega + mu @ inner @ mu


def test_the_approximate_risk_has_a_minimum_with_both_heads_on_one_side() -> None:
    mu, omega = torch.tensor([0.6, 0.9], dtype=torch.float64), torch.tensor([0.5, 0.4], dtype=torch.float64)
    both = torch.cat([omega, mu]).requires_grad_()
    optimizer = torch.optim.Adam([both], lr=0.01)
    for _ in range(1500):
        optimizer.zero_grad()
        approximate_risk(both[:2], both[2:], TASK).backward()
        optimizer.step()
    found = both.detach()
    assert bool((found > 0).all()) and float(found[0]) == pytest.approx(float(found[1]), abs=1e-4)
    curvature = torch.linalg.eigvalsh(torch.autograd.functional.hessian(
        lambda v: approximate_risk(v[:2], v[2:], TASK), found))
    assert float(curvature[0]) > -1e-8  # not a saddle: flat along mu_1 + mu_2 = constant, and up everywhere else
    assert float(curvature[1]) > 0.1
    opposite = torch.tensor([0.05, -0.05], dtype=torch.float64)
    step = optimal_step(TASK) / 0.1
    better = approximate_risk(opposite, step * opposite.sign(), TASK)
    assert float(better) < float(approximate_risk(found[:2], found[2:], TASK)) - 0.1
    assert float(better) == pytest.approx(1.1 - optimal_step(TASK), abs=1e-3)


# ------------------------------------------------------------------------------------------------------ training
def test_seeds_reproduce_and_do_not_depend_on_each_other() -> None:
    one, again = (train(TASK, 2, (0, 3), steps=24, batch=16, progress=False) for _ in range(2))
    alone = train(TASK, 2, (3,), steps=24, batch=16, progress=False)
    assert torch.equal(one.risks, again.risks) and torch.equal(one.kq(), again.kq())
    torch.testing.assert_close(one.kq(1), alone.kq(0), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(one.kq(0), one.kq(1))
    torch.randn(3)
    assert torch.equal(train(TASK, 2, (3,), steps=24, batch=16, progress=False).kq(), alone.kq())


def test_a_short_training_finds_the_signature() -> None:
    found = train(Regression(d=3, L=24), 2, (0, 2), steps=1500, batch=128, progress=False)
    assert all(found.opposite())
    for i in range(2):
        signature = head_signature(found.kq(i), found.ov(i))
        assert float(signature.omega[0]) * float(signature.omega[1]) < 0
        assert signature.mean("off_diagonal") < 0.1 and signature.zero_sum < 0.1
    held = Regression(d=3, L=24)
    data = held.sample(4000, torch.Generator().manual_seed(7))
    assert float(risk(found.kq(0), found.ov(0), held, data)) == pytest.approx(gd_risk(held), rel=0.08)


def test_converged_is_told_apart() -> None:
    found = train(TASK, 1, (0,), steps=48, batch=32, validation=64, progress=False)
    assert found.converged() == [False]
    for start, end, settled in ((0.5, 0.499, True), (0.5, 0.3, False), (1.1, 1.099, False)):
        found.losses = torch.linspace(start, end, len(found.steps))[None]
        assert found.converged() == [settled]


def test_linear_attention_does_not_count() -> None:
    weights = constructed([1.0], [1.0], 5)
    data, longer = draw(), draw(length=80)
    for points_, number in ((data, 40), (longer, 80)):
        found = predict(weights.kq(), weights.ov(), points_, "linear", 40)[:, 0]
        torch.testing.assert_close(found, vanilla_gd(*points(points_), number / 40))
    torch.testing.assert_close(predict(weights.kq(), weights.ov(), longer, "linear")[:, 0],
                               vanilla_gd(*points(longer), 1.0))


# ----------------------------------------------------------------------------------------------------- bad input
def test_bad_input() -> None:
    for field, value, expected in (
            ("d", 1, "an integer >= 2"), ("L", 1, "an integer >= 2"), ("sigma2", -1.0, "a number >= 0"),
            ("rho", 1.0, r"a number in \(-1, 1\)"), ("supports", ((0, 9),), "tuples of"),
            ("supports", ((),), "none of them empty")):
        with pytest.raises(ValueError, match=rf"Regression\.{field}: expected .*{expected}"):
            Regression(**{field: value})  # type: ignore[arg-type]
    for field, value, expected in (
            ("heads", 0, "an integer >= 1"), ("steps", 3, "an integer >= 24"), ("seeds", (), "one integer"),
            ("lr", math.nan, "a number > 0"), ("batch", 0, "an integer >= 1")):
        with pytest.raises(ValueError, match=f"{field}: expected {expected}"):
            train(TASK, **{"heads": 2, "progress": False, field: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="choose a smaller lr"):
        train(TASK, 2, (0,), steps=24, batch=4, lr=1e30, progress=False)
    with pytest.raises(ValueError, match="Did you mean 'softmax'"):
        predict(torch.zeros(1, 6, 6), torch.zeros(1, 1, 6), TASK.sample(2, torch.Generator()), "softmx")
    with pytest.raises(ValueError, match=r"penalty: expected a number >= 0 .* got -1"):
        ridge(*points(draw(count=2)), -1.0)
    with pytest.raises(ValueError, match="expected as many omega as mu"):
        constructed([0.1], [1.0, 2.0], 5)
