"""The paper's claims at small real scale: a residual network with batch norm on the digits of scikit-learn."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn

from looseleaf import Claim, Report
from looseleaf.statistics import Interval, bootstrap
from looseleaf_lab.study import Results, Study, above, add_table, below, curve, every
from looseleaf_lottery_rewinding.pruner import LotteryRewinding
from looseleaf_lottery_rewinding.stability import stability
from looseleaf_tickets import TrainingRun

OURS = "this project's rule"
STARTS = (0, 0.05)
"""Where tickets begin: the initial weights, and the weights after 5 % of the training."""
ZERO, EARLY = 0, 1


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


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """The tickets of one network from both starts, some of them trained twice: figure -> start -> round."""
    from looseleaf_lab import vision

    images, model = vision.digits(seed), vision.resnet(seed, scale.width, scale.blocks)

    def train(model: nn.Module, run: TrainingRun) -> None:
        vision.fit(model, images, run, lambda p: torch.optim.SGD(p, lr=scale.rate, momentum=0.9, weight_decay=1e-4),
                   steps=scale.steps, batch=scale.batch, drops=(0.5, 0.75))

    searches = [LotteryRewinding(rewind_to=start, rounds=scale.rounds, seed=seed).find(
        model, train, lambda m: vision.accuracy(m, images.test), progress=False) for start in STARTS]
    orders = (1000 + 2 * seed, 1001 + 2 * seed)
    return {"density": [ticket.density for ticket in searches[EARLY]], "step": searches[EARLY][-1].step,
            "accuracy": [[ticket.metrics["score"] for ticket in tickets] for tickets in searches],
            "stable": [[dataclasses.asdict(stability(tickets[r], model, train, orders)) for r in scale.stable]
                       for tickets in searches]}


def show(report: Report, results: Results) -> None:
    """Accuracy of all tickets, and the stability of their training."""
    scale = results.scale
    report.facts |= {
        "network": f"residual, batch norm, {6 * scale.blocks + 2} layers, {scale.width} to {4 * scale.width} channels",
        "images": "digits of scikit-learn: 900 to train, 597 to test",
        "training": f"{scale.steps} steps of SGD at {scale.rate}, divided by 10 at a half and at three quarters, "
                    f"momentum 0.9, weight decay 1e-4, batches of {scale.batch}, no warm-up",
        "pruning": "20% of what is left a round, all layers compared together", "step of 5%": results.rows[0]["step"]}
    density = results.rows[0]["density"]
    accuracy = [[results.interval("accuracy", s, r) for r in range(len(density))] for s in (ZERO, EARLY)]
    add_table(report, "Tickets from the initial weights and from early training", (
        {"weights left": density[r], "k": f"{start:.0%}" if r else "whole network", "test accuracy": interval}
        for s, start in enumerate(STARTS) for r, interval in enumerate(accuracy[s])),
        "means over seeds, 95% bootstrap over seeds")
    whole = [accuracy[ZERO][0].value] * (len(density) - 1)
    report.figure("Test accuracy of tickets", x_label="weights left", y_label="test accuracy", x_log=True, series=[
        *(curve(f"k = {start:.0%}", density[1:], accuracy[s][1:]) for s, start in enumerate(STARTS)),
        curve("whole network", density[1:], whole, "line")])
    add_table(report, "Stability to the order of the data", (
        {"weights left": density[r], "k": f"{start:.0%}", "L2 distance": results.interval("stable", s, n, "distance"),
         "angle, degrees": results.interval("stable", s, n, "angle"),
         "travelled": fmean(sum(both) / 2 for both in results.values("stable", s, n, "travelled"))}
        for n, r in enumerate(results.scale.stable) for s, start in enumerate(STARTS)),
        "two trainings of a ticket from one start; travelled: L2 length of the way from there, k steps shorter with "
        "rewinding")


def claims(results: Results) -> Iterator[Claim]:
    """Each claim of the paper, and each line of what this project means by "works"."""
    claim, scale = functools.partial(results.claim, count="seeds"), results.scale
    left = [f"{density:.1%}" for density in results.rows[0]["density"]]
    paired = "95% interval over seeds of the paired difference"

    def gain(rounds: tuple[int, ...]) -> Interval:
        return bootstrap([100 * sum(row["accuracy"][EARLY][r] - row["accuracy"][ZERO][r] for r in rounds) / len(rounds)
                          for row in results.rows])

    for rounds, where, source in ((scale.deep, "", "abstract; section on deeper networks"),
                                  (scale.sparse, ", beyond the paper's 80% sparsity", OURS)):
        overall, (first, last) = gain(rounds), (left[rounds[0]], left[rounds[-1]])
        each = "; ".join(f"{left[r]} left {gain((r,)):+.2f}" for r in rounds)
        yield claim(f"In a deeper network tickets from early training beat tickets from the start{where}", source,
                    "k of 0.1 to 7% of the training [abstract]", f"{paired}, mean of the densities {first} to {last}: "
                    "above 0 holds, below 0 does not hold, else not shown", above(overall),
                    f"test accuracy at k = 5% minus k = 0, points: {overall:+.2f} over {first} to {last} of the "
                    f"weights left ({each})")
    zero, early = (results.interval("accuracy", s, scale.target, minus=("accuracy", s, 0), times=100)
                   for s in (ZERO, EARLY))
    yield claim("With rewinding there are tickets at 80% sparsity that match the whole network", "abstract",
                "80% of the weights of ResNet-50 removed [abstract]",
                f"lower end of the {paired} at -1 point or above", early.low >= -1,
                f"{left[scale.target]} left, k = 5%: {early:+.2f} points against the whole network")
    yield claim("From the initial weights iterative pruning fails there", "abstract", "fails in ResNet-50 [abstract]",
                f"{paired}: below 0 holds, above 0 does not hold, else not shown", below(zero),
                f"{left[scale.target]} left, k = 0: {zero:+.2f} points against the whole network")
    for name, unit in (("distance", "L2 distance"), ("angle", "angle, degrees")):
        gaps = [results.interval("stable", EARLY, n, name, minus=("stable", ZERO, n, name))
                for n in range(len(scale.stable))]
        yield claim(f"Rewinding makes training more stable to the order of the data: smaller {unit.split(',')[0]}",
                    "section on stability", "smaller where accuracy improves [paper]", f"{paired}: below 0 at each "
                    "density holds, above 0 at one does not hold, else not shown", every(*map(below, gaps)),
                    f"{unit} at k = 5% minus k = 0: " + "; ".join(
                        f"{left[r]} left {gap:+.2f}" for r, gap in zip(scale.stable, gaps, strict=True)))
    yield results.claim("The same in ResNet-50 on ImageNet", "abstract", "80% sparsity [abstract]",
                        "no rule: nothing is measured here", None,
                        "not measured: it needs ImageNet and weeks of GPU time")


study = Study("lottery-rewinding: the paper's claims", measure, claims, show, full=Scale(),
              quick=Scale(rounds=2, stable=(1,), deep=(1,), sparse=(2,), target=2, steps=40, width=4, blocks=1))
