"""Images, networks and their training."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch
from torch import nn

from looseleaf import Masks, prunable_parameters
from looseleaf_tickets import Ticket, TrainingRun, train_ticket

vision = pytest.importorskip("looseleaf_lab.vision")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")
torch.set_num_threads(1)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def test_digits_in_parts_that_share_none() -> None:
    one, again, other = vision.digits(0), vision.digits(0), vision.digits(1)
    sizes = [len(part[1]) for part in (one.train, one.validation, one.test)]
    assert sizes == [900, 300, 597] and one.train[0].shape == (900, 1, 8, 8)
    assert torch.equal(one.test[0], again.test[0]) and not torch.equal(one.test[1], other.test[1])
    assert float(one.train[0].min()) >= 0 and float(one.train[0].max()) == 1
    rows = torch.cat([part[0].flatten(1) for part in (one.train, one.validation, one.test)])
    assert len(rows) == 1797 and torch.equal(rows.sum().round(), torch.cat(
        [part[0].flatten(1) for part in (other.train, other.validation, other.test)]).sum().round())
    for train, validation in ((0, 10), (10, 0), (1700, 97)):
        with pytest.raises(ValueError, match="expected train >= 1 and validation >= 1"):
            vision.digits(0, train, validation)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        vision.digits()


def test_networks() -> None:
    state = torch.get_rng_state()
    net, deep = vision.mlp(3), vision.resnet(3)
    assert torch.equal(state, torch.get_rng_state())
    assert sum(p.numel() for p in prunable_parameters(net).values()) == 64 * 300 + 300 * 100 + 1000
    assert len(prunable_parameters(deep)) == 1 + 12 + 2 + 1  # first, blocks, shortcuts, last
    x = torch.rand(2, 1, 8, 8)
    assert net(x).shape == deep(x).shape == (2, 10)
    again, other = vision.mlp(3), vision.mlp(4)
    assert torch.equal(net[1].weight, again[1].weight) and not torch.equal(net[1].weight, other[1].weight)
    assert float(net[3].weight.detach().std()) == pytest.approx((2 / 400) ** 0.5, rel=0.02) and not net[3].bias.any()


def whole(model: nn.Module) -> Ticket:
    masks = Masks({n: torch.ones_like(p, dtype=torch.bool) for n, p in prunable_parameters(model).items()})
    return Ticket(masks, {n: t.clone() for n, t in model.state_dict().items()})


def test_fit_learns_stops_early_and_goes_on_from_a_step() -> None:
    images, model = vision.digits(0), vision.mlp(0, widths=(32,))

    def train(model: nn.Module, run: TrainingRun) -> dict[str, float]:
        return vision.fit(model, images, run, sgd, steps=300, drops=(0.5,), every=10)

    first = train_ticket(whole(model), model, train, lambda m: vision.accuracy(m, images.test), rewind_to=100)
    assert first.metrics["score"] > 0.85 and first.metrics["stopped_accuracy"] > 0.85
    assert first.metrics["early_stop"] % 10 == 0 and 100 < first.metrics["early_stop"] <= 300
    assert first.captured is not None
    rest = train_ticket(Ticket(whole(model).masks, first.captured, 1, 100), model, train)
    assert all(torch.equal(a, b) for a, b in zip(first.model.state_dict().values(), rest.model.state_dict().values()))
    other = train_ticket(whole(model), model, train, seed=1)
    assert not torch.equal(other.model[1].weight, first.model[1].weight)  # type: ignore[index]


def test_bad_batch() -> None:
    with pytest.raises(ValueError, match="batch: expected at most the 900 training images, got 2000"):
        vision.fit(vision.mlp(), vision.digits(), TrainingRun(vision.mlp()), sgd, steps=3, batch=2000)
