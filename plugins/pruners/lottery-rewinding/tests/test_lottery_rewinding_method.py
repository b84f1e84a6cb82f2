"""What is special to rewinding: the step, the optimiser, and the stability of training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from looseleaf import Masks, get
from looseleaf_lottery_rewinding import LotteryRewinding, stability
from looseleaf_tickets import Ticket, TrainingRun

torch.set_num_threads(1)

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
Y = (X[:, :4].sum(1, keepdim=True) > 0).float()
STEPS = 20


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 1))


class Watched:
    """A training function that remembers what it saw."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.rates: list[list[float]] = []
        self.seen: dict[int, dict[str, Tensor]] = {}
        self.states: list[int] = []

    def __call__(self, model: nn.Module, run: TrainingRun) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-3)
        self.starts.append(run.start)
        self.rates.append([])
        self.states.append(len(optimizer.state))
        for step in run.steps(STEPS):
            if run.round == 0:
                self.seen[step] = {n: t.clone() for n, t in model.state_dict().items()}
            optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / STEPS)
            self.rates[-1].append(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            chosen = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(run.seed + step))
            nn.functional.binary_cross_entropy_with_logits(model(X[chosen]), Y[chosen]).backward()
            optimizer.step()


def test_by_name() -> None:
    made = get("lottery-rewinding", rewind_to=20)
    assert isinstance(made, LotteryRewinding) and made.scope == "global" and made.rewinding() == 20


@pytest.mark.parametrize("rewind", [3, 0.15])
def test_tickets_begin_at_step_k(rewind: Any) -> None:
    train = Watched()
    tickets = LotteryRewinding(rewind_to=rewind, rounds=4).find(network(), train, progress=False)
    assert train.starts == [0, 3, 3, 3, 3] and [t.step for t in tickets] == [0, 3, 3, 3, 3]
    assert all(rates == train.rates[0][3:] for rates in train.rates[1:]), "the schedule goes on from step k"
    assert train.states == [0] * 5, "a new optimiser each round"
    total = tickets[0].masks.total()
    for i, ticket in enumerate(tickets[1:], 1):
        assert ticket.masks.removed() == round((1 - 0.8 ** i) * total)
        assert (ticket.masks & tickets[i - 1].masks) == ticket.masks
        model = network()
        ticket.apply(model).make_permanent(model)
        assert all(torch.equal(t, train.seen[3][n] * ticket.masks[n] if n in ticket.masks else train.seen[3][n])
                   for n, t in model.state_dict().items()), "batch-norm statistics go back as well"


def test_step_0_is_the_lottery_ticket_procedure() -> None:
    late = LotteryRewinding(rewind_to=5, rounds=3).find(network(), Watched(), progress=False)
    early = LotteryRewinding(rewind_to=0, rounds=3).find(network(), Watched(), progress=False)
    assert early[1].step == 0 and torch.equal(early[3].start["0.weight"], network().state_dict()["0.weight"])
    assert early[1].masks == late[1].masks, "the first training is the same"
    assert early[3].masks != late[3].masks


@pytest.mark.parametrize("value", [-1, 1.0, 2.5, True, float("nan"), "early", None])
def test_bad_steps(value: Any) -> None:
    with pytest.raises(ValueError, match=r"LotteryRewinding\.rewind_to: expected .*, got"):
        LotteryRewinding(rewind_to=value)


def silent(model: nn.Module, run: TrainingRun) -> None:
    for parameter in model.parameters():
        parameter.data.add_(1)


@pytest.mark.parametrize("rewind, train, words", [
    (STEPS, Watched(), r"expected a step before the last of 20, got 20"), (0.01, Watched(), "rounds to step 0"),
    (3, lambda model: None, "a parameter called run"), (0.1, silent, "reported no step")])
def test_steps_that_are_not_reached(rewind: Any, train: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LotteryRewinding(rewind_to=rewind, rounds=1).prune(network(), train)


# --------------------------------------------------------------------------------------------------------- stability
def fixed(ways: dict[int, list[float]]) -> Any:
    """A training that moves three weights by given amounts, which depend on the seed."""
    def train(model: nn.Module, run: TrainingRun) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.tensor(ways[run.seed]))
    return train


def line(mask: list[bool]) -> Ticket:
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    return Ticket(Masks({"weight": torch.tensor([mask])}), dict(model.state_dict()), 1)


def test_distance_and_angle_by_hand() -> None:
    ticket, model = line([True, True, False]), nn.Linear(3, 1, bias=False)
    found = stability(ticket, model, fixed({0: [3.0, 0.0, 0.0], 1: [0.0, 4.0, 0.0]}))
    assert found.distance == pytest.approx(5) and found.angle == pytest.approx(90)
    assert found.travelled == pytest.approx((3, 4))
    found = stability(ticket, model, fixed({4: [1.0, 1.0, 0.0], 9: [2.0, 2.0, 0.0]}), seeds=(4, 9))
    assert found.distance == pytest.approx(math.sqrt(2)) and found.angle == pytest.approx(0, abs=1e-5)
    found = stability(ticket, model, fixed({0: [1.0, 0.0, 0.0], 1: [-1.0, 0.0, 0.0]}))
    assert found.angle == pytest.approx(180)


def test_the_start_is_the_same_and_the_order_is_not() -> None:
    tickets = LotteryRewinding(rewind_to=3, rounds=2).find(network(), Watched(), progress=False)
    starts: list[dict[str, Tensor]] = []
    orders: list[list[int]] = []

    def train(model: nn.Module, run: TrainingRun) -> None:
        starts.append({n: t.clone() for n, t in model.state_dict().items()})
        orders.append([])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = torch.utils.data.DataLoader(list(range(64)), batch_size=16, shuffle=True)  # type: ignore[arg-type]
        for chosen in run.batches(loader, STEPS):
            orders[-1] += chosen.tolist()
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(model(X[chosen]), Y[chosen]).backward()
            optimizer.step()

    found = stability(tickets[2], network(), train)
    assert found.distance > 0 and 0 < found.angle < 90
    assert all(torch.equal(t, starts[1][n]) for n, t in starts[0].items())
    assert orders[0] != orders[1] and len(orders[0]) == (STEPS - 3) * 16
    assert found == stability(tickets[2], network(), train)


def test_stability_that_cannot_be_measured() -> None:
    ticket, model = line([True, True, False]), nn.Linear(3, 1, bias=False)
    with pytest.raises(ValueError, match="two different ones"):
        stability(ticket, model, fixed({0: [1.0, 1.0, 1.0]}), seeds=(0, 0))
    with pytest.raises(ValueError, match="ended at the same weights"):
        stability(ticket, model, fixed({0: [1.0, 2.0, 0.0], 1: [1.0, 2.0, 0.0]}))
    with pytest.raises(ValueError, match="another model"):
        stability(ticket, network(), fixed({0: [1.0], 1: [2.0]}))
