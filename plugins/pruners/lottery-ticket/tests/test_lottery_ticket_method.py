"""What is special to lottery tickets: resetting, counts, controls, errors."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from looseleaf import LooseleafError, Masks, get
from looseleaf.testing.models import small_network
from looseleaf_lottery_ticket import LotteryTicket, random_mask, random_reinit
from looseleaf_tickets import Ticket, train_ticket

torch.set_num_threads(1)

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
Y = (X[:, :4].sum(1, keepdim=True) > 0).float()
SIZES = {"0.weight": 8 * 30, "2.weight": 30 * 10, "4.weight": 10}


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 10), nn.ReLU(), nn.Linear(10, 1))


def train(model: nn.Module) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=0.01)
    for _ in range(15):
        optimizer.zero_grad()
        chosen = torch.randint(0, 64, (16,))
        nn.functional.binary_cross_entropy_with_logits(model(X[chosen]), Y[chosen]).backward()
        optimizer.step()


def evaluate(model: nn.Module) -> float:
    return float(((model(X) > 0).float() == Y).float().mean())


@pytest.fixture(scope="module")
def tickets() -> list[Ticket]:
    return LotteryTicket(rounds=6, half_rate_layers=("4",)).find(network(), train, evaluate, progress=False)


def test_by_name() -> None:
    made = get("lottery-ticket", rounds=3)
    assert isinstance(made, LotteryTicket) and made.scope == "layer" and made.fraction == 0.2
    assert made.rewinding() == 0


def test_density_of_each_layer_to_the_weight(tickets: list[Ticket]) -> None:
    for i, ticket in enumerate(tickets):
        for name, size in SIZES.items():
            kept = 0.9 if name == "4.weight" else 0.8
            assert ticket.masks.removed(name) == round((1 - kept ** i) * size)


def test_nested_and_reset_bit_for_bit(tickets: list[Ticket]) -> None:
    start = network().state_dict()
    for before, after in itertools.pairwise(tickets):
        assert (before.masks & after.masks) == after.masks
        model = network(seed=9)
        masks = after.apply(model)
        with torch.no_grad():
            assert all(torch.equal(getattr(model[int(n[0])], "weight"), start[n] * masks[n]) for n in masks)  # noqa: B009
        masks.make_permanent(model)
        assert all(torch.equal(t, start[n] * masks[n] if n in masks else start[n])
                   for n, t in model.state_dict().items())


def test_each_round_removes_the_smallest_of_what_is_left() -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def watched(model: nn.Module) -> None:
        train(model)
        with torch.no_grad():
            seen.append({f"{i}.weight": model[i].weight.clone() for i in (0, 2, 4)})  # type: ignore[index, union-attr, operator]

    found = LotteryTicket(rounds=3).find(network(), watched, progress=False)
    for before, after, trained in zip(found, found[1:], seen):
        for name, mask in after.masks.items():
            gone = before.masks[name] & ~mask
            assert trained[name][gone].abs().max() <= trained[name][mask].abs().min()


def test_seeds_reproduce_and_runs_resume(tmp_path: Path) -> None:
    def find(seed: int, **given: Any) -> list[Masks]:
        return [t.masks for t in LotteryTicket(rounds=2, seed=seed).find(network(), train, progress=False, **given)]

    assert find(0) == find(0, state=tmp_path) == find(0, state=tmp_path) and find(0) != find(1)
    with pytest.raises(ValueError, match="another search"):
        find(1, state=tmp_path)


# --------------------------------------------------------------------------------------------------------- controls
def test_random_reinit(tickets: list[Ticket]) -> None:
    model, state = network(), torch.get_rng_state()
    fresh = random_reinit(tickets[4], model, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert fresh.masks == tickets[4].masks and (fresh.round, fresh.step, fresh.metrics) == (4, 0, {})
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), network().state_dict().values()))
    for name, tensor in fresh.start.items():
        old = network().state_dict()[name]
        assert not torch.equal(tensor, old)
        if "weight" in name:
            assert float(tensor.std()) == pytest.approx(float(old.std()), rel=0.5), "the same distribution"
    again, other = random_reinit(tickets[4], model, 3), random_reinit(tickets[4], model, 4)
    assert torch.equal(again.start["0.weight"], fresh.start["0.weight"])
    assert not torch.equal(other.start["0.weight"], fresh.start["0.weight"])
    assert "score" in train_ticket(fresh, model, train, evaluate).metrics


def test_random_reinit_of_models_that_do_not_say_how(tickets: list[Ticket]) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.scale = network(), nn.Parameter(torch.ones(1))

    model = Own()
    masks = Masks({f"layers.{n}": m for n, m in tickets[2].masks.items()})
    ticket = Ticket(masks, {n: t.clone() for n, t in model.state_dict().items()}, 2)
    with pytest.raises(ValueError, match=r"'the model' \(Own\) has weights and no reset_parameters"):
        random_reinit(ticket, model, seed=0)
    with pytest.raises(ValueError, match=r"leaves 'layers\.0\.weight' as it was"):
        random_reinit(ticket, model, seed=0, init=lambda m: None)

    def init(model: Any) -> None:
        for parameter in model.parameters():
            nn.init.normal_(parameter)

    assert random_reinit(ticket, model, 0, init).start["scale"] != 1
    with pytest.raises(ValueError, match="another model"):
        random_reinit(ticket, small_network(), 0)


def test_random_mask(tickets: list[Ticket]) -> None:
    ticket = tickets[4]
    made = random_mask(ticket, seed=3)
    assert made.start is ticket.start and made.density == ticket.density and made.metrics == {}
    assert all(made.masks.removed(n) == ticket.masks.removed(n) for n in SIZES)
    assert made.masks == random_mask(ticket, 3).masks and made.masks != random_mask(ticket, 4).masks
    d = ticket.density
    assert made.masks.cosine(ticket.masks) == pytest.approx(d, abs=0.1), "as similar as chance makes them"


# ----------------------------------------------------------------------------------------------------------- errors
def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"LotteryTicket\.rounds: expected None or at least 7"):
        LotteryTicket(rounds=2, sparsity=0.75)
    for data in (None, [X]):
        with pytest.raises(ValueError, match="expected a training function"):
            LotteryTicket(rounds=1).prune(network(), data)
    with pytest.raises(LooseleafError):
        LotteryTicket(rounds=1).prune(nn.LayerNorm(4), train)
    ticket = LotteryTicket(rounds=1).find(network(), train, progress=False)[1]
    with pytest.raises(ValueError, match="another model"):
        ticket.apply(small_network())

    def diverging(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.data.mul_(torch.inf)

    with pytest.raises(ValueError, match=r"round 0: the weights of '0\.weight' are NaN or infinite"):
        LotteryTicket(rounds=1).prune(network(), diverging)
