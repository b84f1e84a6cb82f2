"""NeuralUCB: gradients, confidence, training."""

from __future__ import annotations

import pytest
import torch

from looseleaf_ease import NeuralUCB


def made(nu: float = 0.01, lam: float = 0.1, steps: int = 50, arms: int = 12, dimensions: int = 6) -> tuple[
        NeuralUCB, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(arms, dimensions, generator=generator)
    bandit = NeuralUCB(dimensions, hidden=9, lam=lam, nu=nu, train_steps=steps, seed=1)
    bandit.fit(seen, seen[:, 0].sigmoid())
    return bandit, seen, torch.randn(300, dimensions, generator=generator)


def test_gradients_equal_a_loop() -> None:
    bandit, _, new = made()
    fast, plain = bandit.gradients(new), bandit.gradients_one_by_one(new)
    assert fast.shape == (300, 6 * 9 + 9 + 2 * (9 * 9 + 9) + 9 + 1)
    assert torch.allclose(fast, plain, atol=1e-6)


def test_the_bound_by_hand() -> None:
    bandit, _, new = made(nu=0.04, lam=0.3)
    bandit.update(bandit.gradients(new[:1])[0])
    bounds, gradients = bandit.bounds(new[:3])
    for n in range(3):
        sigma_squared = sum(0.3 * float(g) ** 2 / float(u) for g, u in zip(gradients[n], bandit.confidence,
                                                                           strict=True))
        assert float(bounds[n]) == pytest.approx(float(bandit.predict(new[n:n + 1])[0])
                                                 + (0.04 * sigma_squared) ** 0.5, rel=1e-4)


def test_without_exploration_it_is_greedy() -> None:
    bandit, _, new = made(nu=0.0)
    assert bandit.select(new)[0] == int(bandit.predict(new).argmax())
    assert torch.equal(bandit.bounds(new)[0], bandit.predict(new))


def test_much_exploration_follows_uncertainty_and_an_update_lowers_it() -> None:
    bandit, _, new = made(nu=1e6)
    chosen, gradient = bandit.select(new)
    widths = bandit.bounds(new)[0] - bandit.predict(new)
    assert chosen == int(widths.argmax())
    before = bandit.confidence.clone()
    bandit.update(gradient)
    assert torch.equal(bandit.confidence, before + gradient * gradient)
    after = bandit.bounds(new)[0] - bandit.predict(new)
    assert after[chosen] < widths[chosen] and (after <= widths + 1e-4 * widths).all()


def test_every_training_begins_with_the_same_weights() -> None:
    bandit, seen, new = made()
    first = bandit.predict(new)
    bandit.fit(seen[:3], torch.zeros(3))
    bandit.fit(seen, seen[:, 0].sigmoid())
    assert torch.equal(bandit.predict(new), first)
    other = NeuralUCB(6, hidden=9, train_steps=50, seed=2)
    other.fit(seen, seen[:, 0].sigmoid())
    assert not torch.equal(other.predict(new), first)


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    made()
    assert torch.equal(torch.get_rng_state(), before)


def test_it_learns() -> None:
    generator = torch.Generator().manual_seed(3)
    seen = torch.randn(120, 8, generator=generator)
    bandit = NeuralUCB(8, train_steps=300)
    assert bandit.fit(seen[:80], seen[:80, 2].tanh()) < 1e-2
    assert torch.corrcoef(torch.stack([bandit.predict(seen[80:]), seen[80:, 2].tanh()]))[0, 1] > 0.7


def test_constant_dimensions_and_a_single_arm() -> None:
    bandit = NeuralUCB(4, hidden=5, train_steps=5)
    bandit.fit(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([0.5]))
    bounds, _ = bandit.bounds(torch.tensor([[1.0, 2.0, 3.0, 5.0]]))
    assert torch.isfinite(bounds).all() and float(bounds.abs().max()) < 100
