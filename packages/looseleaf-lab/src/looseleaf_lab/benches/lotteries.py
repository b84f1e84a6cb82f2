"""Weight pruners on a network small enough to train: one-shot methods beside lottery tickets, at equal sparsity."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import nn

from looseleaf import Report, Series, Unstructured, WeightPruner
from looseleaf import progress as progress_
from looseleaf.modes import evaluating
from looseleaf.plugin import In, Plugin
from looseleaf.statistics import bootstrap
from looseleaf_lab import vision
from looseleaf_lab.benches.bench import Bench, State
from looseleaf_lab.benches.pruned_weights import DENSE, MAGNITUDE, RANDOM, Baseline, Swept, at_sparsity, swept
from looseleaf_lab.facts import facts, identity, left_out, reason
from looseleaf_lab.results import ResultCache
from looseleaf_tickets import IterativePruner, TrainingRun

Row = dict[str, Any]
NETWORKS: dict[str, tuple[Callable[[int], nn.Module], float, int]] = {
    "mlp": (vision.mlp, 0.1, 300), "resnet": (vision.resnet, 0.05, 200)}
"""Name -> maker by seed, learning rate of SGD with momentum 0.9, steps of a training."""


@dataclasses.dataclass
class Lotteries(Bench):
    """Weight pruners on a small classifier of digits that is trained here, lottery tickets among them.

    Args:
        network: mlp (64-300-100-10) or resnet (8 to 32 channels).
        sparsity: fractions of the weights to remove.
        seeds: networks, each with its own weights and split of the digits, from --seed on.
        steps: steps of a training; None: 300 for the mlp, 200 for the resnet.
    """

    network: Literal["mlp", "resnet"] = "mlp"
    sparsity: Annotated[tuple[float, ...], In("[0, 1)")] = (0.5, 0.8, 0.95)
    seeds: Annotated[int, In(">= 1")] = 3
    steps: Annotated[int | None, In(">= 1")] = None
    interface: ClassVar[type[Plugin]] = WeightPruner

    def run(self, plugins: Mapping[str, Any], *, state: State = None, seed: int = 0,
            progress: bool | None = None) -> Report:
        """See :meth:`Bench.run` and :func:`compare_lotteries`."""
        return compare_lotteries(plugins, self.sparsity, network=self.network, seeds=range(seed, seed + self.seeds),
                                 steps=self.steps, state=state, progress=progress)


def compare_lotteries(pruners: Mapping[str, Swept], sparsities: Sequence[float] = (0.5, 0.8, 0.95), *,
                      network: str = "mlp", seeds: Sequence[int] = (0, 1, 2), steps: int | None = None,
                      state: State = None, progress: bool | None = None) -> Report:
    """Test accuracy of every pruner at every sparsity, with the number of trainings that it takes.

    A method of one shot prunes the trained network, which is then trained once more as long under the masks; it may
    learn from batches ``(images, classes)`` of the training data. A :class:`looseleaf_tickets.IterativePruner` finds a
    ticket from the initial weights, which is trained as long. Baselines are the smallest weights and random ones.

    Args:
        pruners: name -> class, instance, or function of the sparsity, as for :func:`compare_pruners`.
        sparsities: fractions of the weights to remove, in [0, 1).
        network: one of :data:`NETWORKS`.
        seeds: of network, split of the digits, and order of the data.
        steps: of each training; None: those of :data:`NETWORKS`.
        state: folder for finished trainings; the same call resumes.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: an unknown network, no sparsity or seed, or one out of range.
        looseleaf_lab.data.MissingDataError: scikit-learn, in which the digits ship, is not installed.
    """
    if network not in NETWORKS or not sparsities or not seeds or not all(0 <= s < 1 for s in sparsities):
        raise ValueError(f"compare_lotteries: expected a network among {', '.join(NETWORKS)}, sparsities in [0, 1) and "
                         f"seeds, got network={network!r}, sparsities={list(sparsities)}, seeds={list(seeds)}")
    vision.digits()  # fails before anything is trained
    steps = steps or NETWORKS[network][2]
    methods: dict[str, Any] = {RANDOM: lambda s: Baseline(RANDOM, Unstructured(s), 0),
                               MAGNITUDE: lambda s: Baseline(MAGNITUDE, Unstructured(s)), **pruners}
    jobs: list[tuple[str, float | None]] = [(DENSE, None)]
    for name, method in methods.items():
        jobs += [(name, s) for s in sparsities] if swept(method) else [(name, None)]
    cells, failed, rows = ResultCache(state), dict[str, str](), dict[tuple[str, float | None], list[Row]]()
    trained = functools.cache(lambda seed: _trained(network, steps, seed))
    every = [(seed, name, sparsity) for seed in seeds for name, sparsity in jobs]
    for seed, name, sparsity in progress_.track(every, "trainings", show=progress):
        label = name if sparsity is None else f"{name} at {sparsity}"
        if label in failed:
            continue
        try:
            pruner = None if name == DENSE else at_sparsity(methods[name], sparsity)
            key = {"what": "lottery", "pruner": name, "sparsity": sparsity, "network": network, "steps": steps,
                   "seed": seed, "parameters": identity(pruner) if pruner is not None else None}
            work = functools.partial(_measure, pruner, network, steps, seed, trained)
            rows.setdefault((name, sparsity), []).append(cells.do(key, work))
        except Exception as error:  # one pruner that fails must not cost the others their figures
            failed[label] = reason(error)
            rows.pop((name, sparsity), None)
    report = Report("Lottery tickets and one-shot pruning side by side", facts(
        network=network, seeds=", ".join(map(str, seeds)), data="digits of scikit-learn, 8 x 8",
        training=f"{steps} steps of SGD with momentum, batches of 60"))
    _show(report, rows)
    left_out(report, failed)
    return report


def _training(images: vision.Images, network: str, steps: int) -> Callable[[nn.Module, TrainingRun], None]:
    rate = NETWORKS[network][1]

    def train(model: nn.Module, run: TrainingRun) -> None:
        vision.fit(model, images, run, lambda p: torch.optim.SGD(p, lr=rate, momentum=0.9), steps=steps, drops=(0.75,))

    return train


def _trained(network: str, steps: int, seed: int) -> tuple[vision.Images, nn.Module]:
    """Data and the dense network of a seed, trained."""
    images, model = vision.digits(seed), NETWORKS[network][0](seed)
    _training(images, network, steps)(model, TrainingRun(model, seed=seed))
    return images, model.eval()


def _accuracy(model: nn.Module, images: vision.Images) -> float:
    with evaluating(model):
        return vision.accuracy(model, images.test)


def _measure(pruner: Any, network: str, steps: int, seed: int,
             trained: Callable[[int], tuple[vision.Images, nn.Module]]) -> Row:
    """Sparsity, accuracy right after pruning (None for tickets) and at the end, trainings and seconds."""
    start = time.perf_counter()
    if isinstance(pruner, IterativePruner):
        images = vision.digits(seed)
        tickets = dataclasses.replace(pruner, seed=seed).find(
            NETWORKS[network][0](seed), _training(images, network, steps), lambda m: _accuracy(m, images),
            progress=False)
        return {"sparsity": tickets[-1].masks.sparsity(), "pruned": None, "accuracy": tickets[-1].metrics["score"],
                "trainings": len(tickets), "seconds": time.perf_counter() - start}
    images, dense = trained(seed)
    if pruner is None:
        accuracy = _accuracy(dense, images)
        return {"sparsity": 0.0, "pruned": accuracy, "accuracy": accuracy, "trainings": 1,
                "seconds": time.perf_counter() - start}
    model = copy.deepcopy(dense)
    batches = list(zip(images.train[0].split(60), images.train[1].split(60), strict=True))
    masks = pruner.prune(model, batches)
    masks.apply(model)
    pruned = _accuracy(model, images)
    _training(images, network, steps)(model, TrainingRun(model, seed=seed + 1))
    return {"sparsity": masks.sparsity(), "pruned": pruned, "accuracy": _accuracy(model, images), "trainings": 2,
            "seconds": time.perf_counter() - start}


def _show(report: Report, rows: Mapping[tuple[str, float | None], list[Row]]) -> None:
    table = report.table("Pruning with training", [
        "pruner", "asked for", "sparsity", "accuracy when pruned", "accuracy", "low", "high", "against dense", "low ",
        "high ", "trainings", "seconds"], note=(
        "accuracy on the test digits, means over seeds, 95 % bootstrap over seeds; when pruned: before the second "
        "training, None for tickets, which are trained from their initial weights; trainings: of whole length"))
    dense = [row["accuracy"] for row in rows.get((DENSE, None), [])]
    curves: dict[str, list[tuple[float, Any]]] = {}
    for (name, asked), found in rows.items():
        accuracy = bootstrap([row["accuracy"] for row in found])
        gap = bootstrap([row["accuracy"] - base for row, base in zip(found, dense, strict=True)]) if dense else None
        pruned = None if found[0]["pruned"] is None else sum(row["pruned"] for row in found) / len(found)
        sparsity = sum(row["sparsity"] for row in found) / len(found)
        table.add(name, asked, sparsity, pruned, *accuracy, *(gap or (None, None, None)), found[0]["trainings"],
                  sum(row["seconds"] for row in found))
        curves.setdefault(name, []).append((sparsity, accuracy))
    report.figure("Test accuracy over sparsity", x_label="sparsity", y_label="test accuracy", series=[
        Series(name, [s for s, _ in points], [a.value for _, a in points], [a.low for _, a in points],
               [a.high for _, a in points]) for name, points in curves.items()])
