"""The paper's claims at small real scale: a residual network with batch norm on the digits of scikit-learn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from looseleaf import Claim, Report, Series
from looseleaf_tickets import TrainingRun
from looseleaf.progress import bar
from looseleaf_lottery_rewinding.pruner import LotteryRewinding
from looseleaf_lottery_rewinding.stability import Stability, stability

OURS = "this project's rule"
STARTS = (0, 0.05)
"""Where tickets begin: the initial weights, and the weights after 5 % of the training."""


@dataclass(frozen=True)
class Scale:
    """How much is trained. SGD, momentum, weight decay, rate and drops are those of residual networks on CIFAR-10."""

    rounds: int = 16  # 2.8 % of the weights are left
    stable: tuple[int, ...] = (4, 8)  # 41 and 17 % left: where two trainings are compared
    deep: tuple[int, ...] = (7, 8, 9, 10)  # 21 to 11 % left: where starts are compared
    sparse: tuple[int, ...] = (11, 12, 13, 14, 15, 16)  # 9 to 3 % left: and where these are
    target: int = 8  # the first round beyond 80 % sparsity
    steps: int = 500
    batch: int = 64
    rate: float = 0.1
    width: int = 8
    blocks: int = 2


QUICK = Scale(rounds=2, stable=(1,), deep=(1,), sparse=(2,), target=2, steps=40, width=4, blocks=1)


@dataclass
class Measured:
    """What one seed gave, for each start."""

    accuracy: dict[float, list[float]] = field(default_factory=dict)
    stable: dict[float, dict[int, Stability]] = field(default_factory=dict)
    density: list[float] = field(default_factory=list)
    step: int = 0


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
    report = Report("lottery-rewinding: the paper's claims", facts={
        "seeds": len(names), "quick": quick,
        "network": f"residual, batch norm, {6 * scale.blocks + 2} layers, {scale.width} to {4 * scale.width} channels",
        "images": "digits of scikit-learn: 900 to train, 597 to test",
        "training": f"{scale.steps} steps of SGD at {scale.rate}, divided by 10 at a half and at three quarters, "
                    f"momentum 0.9, weight decay 1e-4, batches of {scale.batch}, no warm-up",
        "pruning": "20% of what is left a round, all layers compared together",
        "step of 5%": found[0].step, "torch": torch.__version__})
    _show(report, found, scale)
    _claims(report, found, scale, quick)
    report.facts["seconds"] = time.perf_counter() - began
    return report


def measure(seed: int, scale: Scale) -> Measured:
    """Find the tickets of one network from both starts, and train some of them twice."""
    from looseleaf_lab import vision

    images, model, out = vision.digits(seed), vision.resnet(seed, scale.width, scale.blocks), Measured()

    def train(model: nn.Module, run: TrainingRun) -> None:
        vision.fit(model, images, run, lambda p: torch.optim.SGD(p, lr=scale.rate, momentum=0.9, weight_decay=1e-4),
                   steps=scale.steps, batch=scale.batch, drops=(0.5, 0.75))

    for start in STARTS:
        tickets = LotteryRewinding(rewind_to=start, rounds=scale.rounds, seed=seed).find(
            model, train, lambda m: vision.accuracy(m, images.test), progress=False)
        out.accuracy[start] = [ticket.metrics["score"] for ticket in tickets]
        out.density, out.step = [ticket.density for ticket in tickets], tickets[-1].step
        out.stable[start] = {r: stability(tickets[r], model, train, (1000 + 2 * seed, 1001 + 2 * seed))
                             for r in scale.stable}
    return out


def _show(report: Report, found: list[Measured], scale: Scale) -> None:
    table = report.table("Tickets from the initial weights and from early training", [
        "weights left", "k", "test accuracy", "low", "high"], note="means over seeds, 95% bootstrap over seeds")
    figure = report.figure("Test accuracy of tickets", x_label="weights left", y_label="test accuracy", x_log=True)
    x = found[0].density[1:]
    for start in STARTS:
        rows = [_of([m.accuracy[start][r] for m in found]) for r in range(scale.rounds + 1)]
        for r, row in enumerate(rows):
            table.add(found[0].density[r], "whole network" if r == 0 else f"{start:.0%}", *row)
        figure.series.append(Series(f"k = {start:.0%}", x, [r[0] for r in rows[1:]], [r[1] for r in rows[1:]],
                                    [r[2] for r in rows[1:]]))
    figure.series.append(Series("whole network", x, [_of([m.accuracy[0][0] for m in found])[0]] * len(x), style="line"))
    stable = report.table("Stability to the order of the data", [
        "weights left", "k", "L2 distance", "low", "high", "angle, degrees", "low", "high", "travelled"],
        note="two trainings of a ticket from one start; travelled: L2 length of the way from there, k steps shorter "
             "with rewinding")
    for r in scale.stable:
        for start in STARTS:
            both = [m.stable[start][r] for m in found]
            stable.add(found[0].density[r], f"{start:.0%}", *_of([s.distance for s in both]),
                       *_of([s.angle for s in both]), _of([sum(s.travelled) / 2 for s in both])[0])


def _claims(report: Report, found: list[Measured], scale: Scale, quick: bool) -> None:
    n, at = f"{len(found)} seeds", f"{found[0].density[scale.target]:.1%}"
    zero, early = STARTS
    for rounds, where in ((scale.deep, ""), (scale.sparse, ", beyond the paper's 80% sparsity")):
        low, high = (f"{found[0].density[r]:.1%}" for r in (rounds[0], rounds[-1]))
        gain = _of([100 * sum(m.accuracy[early][r] - m.accuracy[zero][r] for r in rounds) / len(rounds) for m in found])
        each = "; ".join(f"{found[0].density[r]:.1%} left "
                         f"{_text(_of([100 * (m.accuracy[early][r] - m.accuracy[zero][r]) for m in found]))}"
                         for r in rounds)
        report.claims.append(Claim.decide(
            _above(gain, quick),
            statement=f"In a deeper network tickets from early training beat tickets from the start{where}",
            source="abstract; section on deeper networks" if not where else OURS,
            paper="k of 0.1 to 7% of the training [abstract]",
            measured=f"test accuracy at k = 5% minus k = 0, points: {_text(gain)} over {low} to {high} of the weights "
                     f"left ({each}); {n}",
            rule=f"95% interval over seeds of the paired difference, mean of the densities {low} to {high}: above 0 "
                 "holds, below 0 does not hold, else not shown"))
    whole = {start: _of([100 * (m.accuracy[start][scale.target] - m.accuracy[start][0]) for m in found])
             for start in STARTS}
    report.claims.append(Claim.decide(
        None if quick else whole[early][1] >= -1,
        statement="With rewinding there are tickets at 80% sparsity that match the whole network",
        source="abstract", paper="80% of the weights of ResNet-50 removed [abstract]",
        measured=f"{at} left, k = 5%: {_text(whole[early])} points against the whole network; {n}",
        rule="lower end of the 95% interval over seeds of the paired difference at -1 point or above"))
    report.claims.append(Claim.decide(
        _above(_minus(whole[zero]), quick),
        statement="From the initial weights iterative pruning fails there", source="abstract",
        paper="fails in ResNet-50 [abstract]",
        measured=f"{at} left, k = 0: {_text(whole[zero])} points against the whole network; {n}",
        rule="95% interval over seeds of the paired difference: below 0 holds, above 0 does not hold, else not shown"))
    for name, unit in (("distance", "L2 distance"), ("angle", "angle, degrees")):
        gaps = {r: _of([getattr(m.stable[early][r], name) - getattr(m.stable[zero][r], name) for m in found])
                for r in scale.stable}
        verdicts = [_above(_minus(g), quick) for g in gaps.values()]
        report.claims.append(Claim.decide(
            False if False in verdicts else None if None in verdicts else True,
            statement=f"Rewinding makes training more stable to the order of the data: smaller {unit.split(',')[0]}",
            source="section on stability", paper="smaller where accuracy improves [paper]",
            measured=f"{unit} at k = 5% minus k = 0: " + "; ".join(
                f"{found[0].density[r]:.1%} left {_text(g)}" for r, g in gaps.items()) + f"; {n}",
            rule="95% interval over seeds of the paired difference: below 0 at each density holds, above 0 at one does "
                 "not hold, else not shown"))
    report.claims.append(Claim.decide(
        None, statement="The same in ResNet-50 on ImageNet", source="abstract", paper="80% sparsity [abstract]",
        measured="not measured: it needs ImageNet and weeks of GPU time", rule="no rule: nothing is measured here"))


def _above(value: tuple[float, float, float], quick: bool) -> bool | None:
    """Whether an interval lies above 0; None where it holds 0 or nothing is to be decided."""
    return None if quick or value[1] <= 0 <= value[2] else value[1] > 0


def _minus(value: tuple[float, float, float]) -> tuple[float, float, float]:
    return -value[0], -value[2], -value[1]


def _of(values: Sequence[float]) -> tuple[float, float, float]:
    from looseleaf.statistics import bootstrap

    return bootstrap(values)


def _text(value: tuple[float, float, float]) -> str:
    return f"{value[0]:+.2f} ({value[1]:+.2f} to {value[2]:+.2f})"
