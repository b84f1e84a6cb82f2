"""The paper's claims at small real scale: a network of LeNet's widths on the digits of scikit-learn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from looseleaf import Claim, Report, Series
from looseleaf_tickets import Ticket, TrainingRun, train_ticket
from looseleaf.progress import bar
from looseleaf_lottery_ticket.controls import random_mask, random_reinit
from looseleaf_lottery_ticket.pruner import LotteryTicket

OURS = "this project's rule"
TICKET, REINIT, MASK = "ticket", "random reinit", "random mask"
OUTPUT = "5"
"""The output layer of the network, pruned at half the rate."""


@dataclass(frozen=True)
class Scale:
    """How much is trained. Optimiser, learning rate, batch and rates are the paper's for LeNet on MNIST [memory]."""

    rounds: tuple[int, ...] = (3, 6, 9, 12, 15)  # 51, 26, 13, 7 and 3.5 % of the weights are left
    steps: int = 3000  # long enough for the sparsest: their validation loss falls beyond step 1200
    every: int = 10
    reinits: int = 3
    rate: float = 1.2e-3
    batch: int = 60


QUICK = Scale(rounds=(1, 2), steps=60, reinits=1)


@dataclass
class Measured:
    """What one seed gave: kind of start -> round -> value, means over reinitialisations."""

    accuracy: dict[str, dict[int, float]] = field(default_factory=lambda: {TICKET: {}, REINIT: {}, MASK: {}})
    early: dict[str, dict[int, float]] = field(default_factory=lambda: {TICKET: {}, REINIT: {}, MASK: {}})
    final: dict[str, dict[int, float]] = field(default_factory=lambda: {TICKET: {}, REINIT: {}, MASK: {}})
    cut_off: dict[str, dict[int, float]] = field(default_factory=lambda: {TICKET: {}, REINIT: {}, MASK: {}})
    density: dict[int, float] = field(default_factory=dict)

    def take(self, kind: str, round: int, metrics: Sequence[dict[str, float]]) -> None:
        """Take the means of some trainings in."""
        for where, name in ((self.accuracy, "stopped_accuracy"), (self.early, "early_stop"), (self.final, "final"),
                            (self.cut_off, "cut_off")):
            where[kind][round] = sum(m[name] for m in metrics) / len(metrics)


def reproduce(*, seeds: int = 5, quick: bool = False, progress: bool | None = None) -> Report:
    """Measure each claim of the paper, and each line of what this project means by "works".

    Args:
        seeds: networks, each from its own initial weights on its own split of the images.
        quick: two rounds of short trainings: shows that everything runs, decides nothing.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: ``seeds`` below 1.
        ModuleNotFoundError: the extra ``reproduce`` is not installed.
    """
    if not isinstance(seeds, int) or seeds < 1:
        raise ValueError(f"seeds={seeds!r}: allowed is a whole number, at least 1")
    began = time.perf_counter()
    scale, names = QUICK if quick else Scale(), range(min(seeds, 2) if quick else seeds)
    found = []
    with bar("networks", len(names), progress) as moving:
        for seed in names:
            found.append(measure(seed, scale))
            moving.update()
    report = Report("lottery-ticket: the paper's claims", facts={
        "seeds": len(names), "quick": quick, "network": "64-300-100-10, ReLU, Glorot weights",
        "images": "digits of scikit-learn: 900 to train, 300 to stop early, 597 to test",
        "training": f"{scale.steps} steps of Adam at {scale.rate}, batches of {scale.batch}",
        "pruning": "20% of what is left a round, layer by layer, output layer 10%",
        "reinitialisations of each ticket": scale.reinits, "torch": torch.__version__})
    _show(report, found, scale)
    _claims(report, found, scale, quick)
    report.facts["seconds"] = time.perf_counter() - began
    return report


def measure(seed: int, scale: Scale) -> Measured:
    """Find the tickets of one network, and train their controls."""
    from looseleaf_lab import vision

    images, model, out = vision.digits(seed), vision.mlp(seed), Measured()

    def train(model: nn.Module, run: TrainingRun) -> dict[str, float]:
        found = vision.fit(model, images, run, lambda p: torch.optim.Adam(p, lr=scale.rate), steps=scale.steps,
                           batch=scale.batch, every=scale.every)
        return {**found, "cut_off": float(found["early_stop"] > scale.steps - scale.every)}

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"final": vision.accuracy(model, images.test)}

    def control(ticket: Ticket) -> dict[str, float]:
        return train_ticket(ticket, model, train, evaluate, seed=seed).metrics

    pruner = LotteryTicket(rounds=max(scale.rounds), half_rate=(OUTPUT,), seed=seed)
    tickets = pruner.find(model, train, evaluate, progress=False)
    for round in (0, *scale.rounds):
        out.density[round] = tickets[round].density
        out.take(TICKET, round, [tickets[round].metrics])
    for round in scale.rounds:
        draws = [random_reinit(tickets[round], model, 1000 * (seed + 1) + i, vision.glorot)
                 for i in range(scale.reinits)]
        out.take(REINIT, round, [control(draw) for draw in draws])
        out.take(MASK, round, [control(random_mask(tickets[round], 1000 * (seed + 1)))])
    return out


def _show(report: Report, found: list[Measured], scale: Scale) -> None:
    table = report.table("Tickets and their controls", [
        "weights left", "start", "test accuracy, stopped early", "low", "high", "early-stopping step", "low", "high",
        "cut off", "test accuracy, last step"],
        note="means over seeds, 95% bootstrap over seeds; stopped early: at the least validation loss; cut off: share "
             "of trainings whose validation loss was least at the very end")
    x = [found[0].density[r] for r in scale.rounds]
    accuracy = report.figure("Test accuracy, stopped early", x_label="weights left", y_label="test accuracy",
                             x_log=True)
    early = report.figure("Early stopping", x_label="weights left", y_label="step of the least validation loss",
                          x_log=True)
    for kind in (TICKET, REINIT, MASK):
        rounds = ([0] if kind == TICKET else []) + list(scale.rounds)
        rows = [(_of([m.accuracy[kind][r] for m in found]), _of([m.early[kind][r] for m in found]),
                 _of([m.final[kind][r] for m in found])) for r in rounds]
        for r, (right, stop, final) in zip(rounds, rows):
            table.add(found[0].density[r], "whole network" if r == 0 else kind, *right, *stop,
                      sum(m.cut_off[kind][r] for m in found) / len(found), final[0])
        for figure, which in ((accuracy, 0), (early, 1)):
            points = [row[which] for row in rows][-len(x):]
            figure.series.append(Series(kind, x, [p[0] for p in points], [p[1] for p in points],
                                        [p[2] for p in points]))
    whole = [m.accuracy[TICKET][0] for m in found]
    accuracy.series.append(Series("whole network", x, [_of(whole)[0]] * len(x), style="line"))


def _claims(report: Report, found: list[Measured], scale: Scale, quick: bool) -> None:
    sparse = scale.rounds if quick else tuple(r for r in scale.rounds if r >= 9)
    to_fifth = scale.rounds if quick else tuple(r for r in scale.rounds if r <= 9)
    last = to_fifth[-1]
    n = f"{len(found)} seeds"

    def at(r: int) -> str:
        return f"{found[0].density[r]:.1%}"

    gaps = {r: _of([100 * (m.accuracy[TICKET][r] - m.accuracy[TICKET][0]) for m in found]) for r in scale.rounds}
    report.claims.append(Claim.decide(
        None if quick else all(gaps[r][1] >= -1 for r in to_fifth),
        statement="Winning tickets of less than 20% of the size reach the whole network's test accuracy",
        source="abstract; margin of a point: " + OURS, paper="less than 10-20% of the size [abstract]",
        measured="ticket minus whole network, points: " + "; ".join(f"{at(r)} left {_text(gaps[r])}" for r in gaps)
                 + f"; {n}",
        rule=f"lower end of the 95% interval over seeds of the paired difference at -1 point or above at each of "
             f"{', '.join(map(at, to_fifth))}"))
    sooner = {r: _of([m.early[TICKET][r] - m.early[TICKET][0] for m in found]) for r in scale.rounds}
    report.claims.append(Claim.decide(
        None if quick else all(sooner[r][2] <= 0 for r in to_fifth),
        statement="... in at most its number of iterations", source="abstract", paper="at most [abstract]",
        measured="early-stopping step of the ticket minus that of the whole network: " + "; ".join(
            f"{at(r)} left {_text(sooner[r], 0)}" for r in sooner) + f"; {n}",
        rule=f"upper end of the 95% interval of the paired difference at 0 or below at each of "
             f"{', '.join(map(at, to_fifth))}"))
    report.claims.append(Claim.decide(
        None if quick else sooner[last][2] < 0 and gaps[last][1] > 0,
        statement="Winning tickets above 10-20% of the size learn faster and reach higher accuracy than the whole",
        source="abstract; section 2", paper="up to +0.3 points at 13.5% of LeNet [paper, as remembered]",
        measured=f"{at(last)} left: {_text(sooner[last], 0)} steps, {_text(gaps[last])} points; {n}",
        rule=f"at {at(last)}: interval of the steps below 0 and that of the accuracy above 0"))
    for kind, statement in ((REINIT, "Randomly reinitialised tickets are worse"),
                            (MASK, "Random masks of the same density on the same initial weights are worse")):
        pairs = {r: (_of([m.accuracy[TICKET][r] for m in found]), _of([m.accuracy[kind][r] for m in found]))
                 for r in sparse}
        report.claims.append(Claim.decide(
            None if quick else all(mine[1] > theirs[2] for mine, theirs in pairs.values()),
            statement=statement, source="section 2" if kind == REINIT else OURS,
            paper="accuracy falls sooner [paper, as remembered]",
            measured="; ".join(f"{at(r)} left: {_percent(mine)} against {_percent(theirs)}"
                               for r, (mine, theirs) in pairs.items()) + f"; test accuracy, stopped early, {n}",
            rule=f"intervals do not overlap at each of {', '.join(map(at, sparse))}"))
    slower = {r: _of([m.early[TICKET][r] - m.early[REINIT][r] for m in found]) for r in sparse}
    report.claims.append(Claim.decide(
        None if quick else all(gap[2] <= 0 for gap in slower.values()),
        statement="Randomly reinitialised tickets learn slower", source="section 2",
        paper="early-stopping iteration later [paper, as remembered]",
        measured="early-stopping step of the ticket minus that of its reinitialisations: " + "; ".join(
            f"{at(r)} left {_text(gap, 0)}" for r, gap in slower.items()) + f"; {n}",
        rule=f"upper end of the 95% interval of the paired difference at 0 or below at each of "
             f"{', '.join(map(at, sparse))}"))
    report.claims.append(Claim.decide(
        None, statement="The same in convolutional networks on CIFAR-10", source="section 3",
        paper="less than 10-20% of conv-2, conv-4 and conv-6 [abstract]",
        measured="not measured: minutes on a CPU are too few for CIFAR-10", rule="no rule: nothing is measured here"))


def _of(values: Sequence[float]) -> tuple[float, float, float]:
    from looseleaf.statistics import bootstrap

    return bootstrap(values)


def _text(value: tuple[float, float, float], digits: int = 2) -> str:
    return f"{value[0]:+.{digits}f} ({value[1]:+.{digits}f} to {value[2]:+.{digits}f})"


def _percent(value: tuple[float, float, float]) -> str:
    return f"{value[0]:.2%} ({value[1]:.2%} to {value[2]:.2%})"
