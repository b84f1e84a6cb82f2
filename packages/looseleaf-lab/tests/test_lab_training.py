"""The one loop that trains small models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from looseleaf.testing.common import mixed_modes
from looseleaf_lab.training import fit, warmup_cosine

torch.set_num_threads(1)


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))


X, Y = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 2


def loss_of(model: nn.Module, generator: torch.Generator) -> Callable[[int], Tensor]:
    def loss(step: int) -> Tensor:
        chosen = torch.randint(0, 64, (8,), generator=generator)
        return nn.functional.cross_entropy(model(X[chosen]), Y[chosen])

    return loss


def by_hand(model: nn.Module, steps: int, rate: float) -> list[float]:
    """The loop as everyone writes it."""
    generator, out = torch.Generator().manual_seed(3), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(0, 64, (8,), generator=generator)
        value = nn.functional.cross_entropy(model(X[chosen]), Y[chosen])
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        out.append(float(value.detach()))
    return out


def test_the_same_numbers_as_a_loop_by_hand() -> None:
    ours, reference = network(), network()
    torch.manual_seed(5)
    wanted = by_hand(reference, 12, 0.01)
    torch.manual_seed(5)
    losses = fit(ours, loss_of(ours, torch.Generator().manual_seed(3)), steps=12, clip=0.5, progress=False,
                 optimizer=lambda p: torch.optim.AdamW(p, lr=0.01),
                 schedule=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12))
    assert losses == wanted
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), reference.state_dict().values()))


def test_steps_may_be_any_numbers_and_factors_follow_them() -> None:
    model, rates, seen = network(), [], []
    optimizer = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[4].parameters(),
                                                                               "lr": 0.2}])

    def loss(step: int) -> Tensor:
        seen.append(step)
        rates.append([round(group["lr"], 6) for group in optimizer.param_groups])
        return model(X).square().mean()

    fit(model, loss, steps=range(4, 8), optimizer=optimizer, factor=lambda step: 0.1 ** (step >= 6), progress=False)
    assert seen == [4, 5, 6, 7] and rates == [[0.1, 0.2], [0.1, 0.2], [0.01, 0.02], [0.01, 0.02]]


def test_modes_come_back_also_after_an_exception() -> None:
    model = network()
    modes = [m.training for m in mixed_modes(model).modules()]
    inside: list[list[bool]] = []

    def loss(step: int) -> Tensor:
        inside.append([m.training for m in model.modules()])
        if step == 3:
            raise RuntimeError("stop")
        return model(X).mean()

    with pytest.raises(RuntimeError, match="stop"):
        fit(model, loss, steps=5, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), progress=False)
    assert all(all(row) for row in inside)
    assert [m.training for m in model.modules()] == modes and len(set(modes)) == 2


def test_watching_is_done_in_evaluation_mode_without_gradients() -> None:
    model, seen = network(), []

    def watch(done: int) -> None:
        seen.append((done, model.training, torch.is_grad_enabled()))

    fit(model, lambda step: model(X).mean(), steps=range(2, 10), every=3, watch=watch, progress=False,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert seen == [(3, False, False), (6, False, False), (9, False, False)], "counted from the first step of all"


def test_a_loss_that_is_not_finite_is_reported_before_the_weights_are_lost() -> None:
    model = network()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="step 0: expected a finite loss, got nan"):
        fit(model, lambda step: model(X).mean() * float("nan"), steps=3, progress=False,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps: expected an integer >= 1, got {steps}"):
        fit(network(), lambda step: X.mean(), steps=steps, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))


def test_warmup_and_cosine() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule, rates = warmup_cosine(optimizer, 40), []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == 0.5 and rates[2] == max(rates) == 1.0 and rates[-1] < 0.01
    assert rates[3:] == sorted(rates[3:], reverse=True)
