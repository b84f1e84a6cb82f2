"""The paper's claims at small real scale: LeNet-300-100 on the 10,000 digits of MNIST that ship in a package."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from looseleaf import Claim, Report
from looseleaf.statistics import Interval
from looseleaf_lab.study import Results, Study, add_table, curve
from looseleaf_lottery_ticket.controls import random_mask, random_reinit
from looseleaf_lottery_ticket.pruner import LotteryTicket
from looseleaf_tickets import Ticket, TrainingRun, train_ticket

OURS = "this project's rule"
TICKET, REINIT, MASK = "ticket", "random reinit", "random mask"
WHOLE = (TICKET, 0)
OUTPUT = "5"
"""The output layer of the network, pruned at half the rate."""


@dataclass(frozen=True)
class Scale:
    """How much is trained. Optimiser, learning rate, batch and rates are the paper's for LeNet on MNIST [memory]."""

    rounds: tuple[int, ...] = (3, 6, 9, 12, 15)  # 51, 26, 13, 7 and 3.5 % of the weights are left
    steps: int = 2000  # 17 epochs
    every: int = 20
    reinits: int = 3
    images: str = "mnist"
    rate: float = 1.2e-3
    batch: int = 60


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """The tickets of one network and their controls: density, and kind of start -> round -> metric -> value."""
    from looseleaf_lab import vision

    images = vision.mnist(seed) if scale.images == "mnist" else vision.digits(seed)
    model = vision.mlp(seed, inputs=images.train[0][0].numel())

    def train(model: nn.Module, run: TrainingRun) -> dict[str, float]:
        metrics = vision.fit(model, images, run, lambda p: torch.optim.Adam(p, lr=scale.rate), steps=scale.steps,
                             batch=scale.batch, every=scale.every)
        return {**metrics, "cut_off": float(metrics["early_stop"] > scale.steps - scale.every)}

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"final": vision.accuracy(model, images.test)}

    def means(controls: Iterable[Ticket]) -> dict[str, float]:
        runs = [train_ticket(control, model, train, evaluate, seed=seed).metrics for control in controls]
        return {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}

    tickets = LotteryTicket(rounds=max(scale.rounds), half_rate_layers=(OUTPUT,), seed=seed).find(
        model, train, evaluate, progress=False)
    draw = 1000 * (seed + 1)
    return {"density": {r: tickets[r].density for r in (0, *scale.rounds)},
            TICKET: {r: tickets[r].metrics for r in (0, *scale.rounds)},
            REINIT: {r: means(random_reinit(tickets[r], model, draw + i, vision.glorot) for i in range(scale.reinits))
                     for r in scale.rounds}, MASK: {r: means([random_mask(tickets[r], draw)]) for r in scale.rounds}}


def show(report: Report, results: Results) -> None:
    """The table of all tickets and controls, and the paper's two figures."""
    scale = results.scale
    inputs, images = {
        "mnist": (784, "10,000 digits of MNIST: 7,000 to train, 1,000 to stop early, 2,000 to test"),
        "digits": (64, "digits of scikit-learn: 900 to train, 300 to stop early, 597 to test")}[scale.images]
    report.facts |= {"network": f"{inputs}-300-100-10, ReLU, Glorot weights", "images": images,
                     "training": f"{scale.steps} steps of Adam at {scale.rate}, batches of {scale.batch}",
                     "pruning": "20% of what is left a round, layer by layer, output layer 10%",
                     "reinitialisations of each ticket": scale.reinits}
    density, rounds = results.rows[0]["density"], scale.rounds
    starts = {TICKET: (0, *rounds), REINIT: rounds, MASK: rounds}
    add_table(report, "Tickets and their controls", (
        {"weights left": density[str(r)], "start": kind if r else "whole network",
         "test accuracy, stopped early": results.interval(kind, r, "stopped_accuracy"),
         "early-stopping step": results.interval(kind, r, "early_stop"), "cut off": results.mean(kind, r, "cut_off"),
         "test accuracy, last step": results.mean(kind, r, "final")} for kind in starts for r in starts[kind]),
        "means over seeds, 95% bootstrap over seeds; stopped early: at the least validation loss; cut off: fraction of "
        "trainings whose validation loss was least at the very end")
    x = [density[str(r)] for r in rounds]
    for title, y_label, metric in (("Test accuracy, stopped early", "test accuracy", "stopped_accuracy"),
                                   ("Early stopping", "step of the least validation loss", "early_stop")):
        report.figure(title, x_label="weights left", y_label=y_label, x_log=True, series=[
            curve(kind, x, [results.interval(kind, r, metric) for r in rounds]) for kind in starts])
    whole = results.mean(*WHOLE, "stopped_accuracy")
    report.figures[-2].series.append(curve("whole network", x, [whole] * len(x), "line"))


def claims(results: Results) -> Iterator[Claim]:
    """Each claim of the paper, and each line of what this project means by "works"."""
    claim, rounds, quick = functools.partial(results.claim, count="seeds"), results.scale.rounds, results.quick
    sparse, to_fifth = [r for r in rounds if quick or r >= 9], [r for r in rounds if quick or r <= 9]
    last = to_fifth[-1]
    left = {r: f"{results.rows[0]['density'][str(r)]:.1%}" for r in rounds}
    at_sparse, at_fifth = (", ".join(left[r] for r in where) for where in (sparse, to_fifth))
    gaps = {r: results.interval(TICKET, r, "stopped_accuracy", minus=(*WHOLE, "stopped_accuracy"), times=100)
            for r in rounds}
    sooner = {r: results.interval(TICKET, r, "early_stop", minus=(*WHOLE, "early_stop")) for r in rounds}
    slower = {r: results.interval(TICKET, r, "early_stop", minus=(REINIT, r, "early_stop")) for r in sparse}

    def listed(intervals: dict[int, Interval], digits: int) -> str:
        return "; ".join(f"{left[r]} left {interval:+.{digits}f}" for r, interval in intervals.items())

    paired = "end of the 95% interval over seeds of the paired difference at"
    yield claim("Winning tickets of less than 20% of the size reach the whole network's test accuracy",
                f"abstract; margin of a point: {OURS}", "less than 10-20% of the size [abstract]",
                f"lower {paired} -1 point or above at each of {at_fifth}", all(gaps[r].low >= -1 for r in to_fifth),
                f"ticket minus whole network, points: {listed(gaps, 2)}")
    yield claim("... in at most its number of iterations", "abstract", "at most [abstract]",
                f"upper {paired} 0 or below at each of {at_fifth}", all(sooner[r].high <= 0 for r in to_fifth),
                f"early-stopping step of the ticket minus that of the whole network: {listed(sooner, 0)}")
    yield claim("Winning tickets above 10-20% of the size learn faster and reach higher accuracy than the whole",
                "abstract; section 2", "up to +0.3 points at 13.5% of LeNet [paper, as remembered]",
                f"at {left[last]}: interval of the steps below 0 and that of the accuracy above 0",
                sooner[last].high < 0 and gaps[last].low > 0,
                f"{left[last]} left: {sooner[last]:+.0f} steps, {gaps[last]:+.2f} points")
    for kind, statement, source in (
            (REINIT, "Randomly reinitialised tickets are worse", "section 2"),
            (MASK, "Random masks of the same density on the same initial weights are worse", OURS)):
        pairs = {r: [results.interval(which, r, "stopped_accuracy") for which in (TICKET, kind)] for r in sparse}
        yield claim(statement, source, "accuracy falls sooner [paper, as remembered]", "intervals do not overlap at "
                    f"each of {at_sparse}", all(ticket.low > control.high for ticket, control in pairs.values()),
                    "; ".join(f"{left[r]} left: {ticket:.2%} against {control:.2%}"
                              for r, (ticket, control) in pairs.items()) + "; test accuracy, stopped early")
    yield claim("Randomly reinitialised tickets learn slower", "section 2",
                "early-stopping iteration later [paper, as remembered]",
                f"upper {paired} 0 or below at each of {at_sparse}", all(gap.high <= 0 for gap in slower.values()),
                f"early-stopping step of the ticket minus that of its reinitialisations: {listed(slower, 0)}")
    yield results.claim("The same in convolutional networks on CIFAR-10", "section 3",
                        "less than 10-20% of conv-2, conv-4 and conv-6 [abstract]", "no rule: nothing is measured here",
                        None, "not measured: minutes on a CPU are too few for CIFAR-10")


study = Study("lottery-ticket: the paper's claims", measure, claims, show, full=Scale(),
              quick=Scale(rounds=(1, 2), steps=60, reinits=1, images="digits"))
