"""The probe: what a sparse network loses against the dense one when both are reused, by shots."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import nn

from looseleaf import Example, Masks, Probe, Report, Series, Task, prunable_parameters
from looseleaf.modes import evaluating
from looseleaf.plugin import In
from looseleaf.probes.subject import parts
from looseleaf.progress import bar
from looseleaf.prompts.prompt import Prompt
from looseleaf.resume import digest
from looseleaf.statistics import Interval, bootstrap
from looseleaf_reprogram_lt.optimizer import PAPER, ClassifierOptimizer, LinearHead, ReprogramPrompt, VisualReprogram
from looseleaf_tickets import Ticket
from looseleaf_vision import ImageClassifier, calibration_error

DENSE = "dense"
METHODS = ("vp", "lp")
Network = Masks | Ticket | nn.Module
"""A sparse version of a network: masks of its weights, a ticket with its own, or a network that is sparse already."""
Row = dict[str, Any]


@dataclasses.dataclass
class TransferData:
    """What a network is reused for, and its sparse versions.

    Attributes:
        tasks: of pictures, with classes and test examples.
        tickets: name -> :class:`looseleaf.Masks` (of the network's own weights), a :class:`looseleaf_tickets.Ticket`
            (its own weights and masks), or a network of the same outputs that is sparse already.
        upstream: pictures of what the network was made for; with targets, the names or numbers of its outputs,
            accuracy is measured, else agreement with the dense network alone.
    """

    tasks: Sequence[Task]
    tickets: Mapping[str, Network]
    upstream: Sequence[Example] = ()


@dataclasses.dataclass
class TransferCost(Probe):
    """Before you ship a sparse backbone: what does sparsity cost when it is reused with its weights untouched?

    The dense network and each sparse one are given the same new tasks, by learned pixels (``vp``) and by a linear head
    (``lp``), with the same shots in the same order. Masked zeros make nothing faster: the cost alone is measured.

    Args:
        shots: training pictures of each class; 0: all.
        seeds: repetitions with other shots and another order; intervals are over them.
        methods: vp, lp or both.
        epochs: of both methods (authors' code).
        lr: first learning rate of both, divided by 10 at 50 and 72 % (authors' code).
        batch_size: pictures in a step of both (authors' code).
        in_size: height and width of the picture inside the border; see :class:`VisualReprogram`.
        mapping: how outputs are chosen for vp; see :class:`VisualReprogram`.
        bins: of the calibration error, of equal width.
        state_dir: trained pixels and heads are kept there, and a run that was stopped goes on.
    """

    paper = PAPER
    shots: Annotated[tuple[int, ...], In(">= 0")] = (1, 10, 50, 0)
    seeds: Annotated[int, In(">= 1")] = 3
    methods: tuple[Literal["vp", "lp"], ...] = ("vp", "lp")
    epochs: Annotated[int, In(">= 1")] = 100
    lr: Annotated[float, In("> 0")] = 0.01
    batch_size: Annotated[int, In(">= 1")] = 128
    in_size: Annotated[int | None, In(">= 1")] = None
    mapping: Literal["ilm", "flm", "random"] = "ilm"
    bins: Annotated[int, In(">= 1")] = 15
    state_dir: str | None = None
    kinds: ClassVar[dict[str, str]] = {"vp": "learned pixels", "lp": "linear head"}

    def validate(self) -> None:
        """See :meth:`looseleaf.Plugin.validate`."""
        self.check("shots", bool(self.shots), "one number or more")
        self.check("methods", bool(self.methods) and set(self.methods) <= set(METHODS), "'vp', 'lp' or both")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`."""
        from looseleaf_vision.testing import toy_classifier, toy_pictures

        def data() -> TransferData:
            model = toy_classifier().model
            masks = Masks({n: p.detach().abs() > p.detach().abs().median()
                           for n, p in prunable_parameters(model).items()})
            task = toy_pictures()
            return TransferData([task], {"half": masks}, task.dev)

        return {"make": lambda: cls(shots=(2,), seeds=1, epochs=4, batch_size=8), "subject": toy_classifier,
                "data": data()}

    def method(self, name: str, shots: int) -> ClassifierOptimizer:
        """The optimiser of ``vp`` or ``lp`` with so many shots."""
        common: dict[str, Any] = {"epochs": self.epochs, "lr": self.lr, "batch_size": self.batch_size,
                                  "shots": shots or None}
        return LinearHead(**common) if name == "lp" else VisualReprogram(in_size=self.in_size, mapping=self.mapping,
                                                                        **common)

    def measure(self, model: ImageClassifier, data: TransferData, seed: int = 0, *, progress: bool | None = None,
                prompts: dict[tuple[str, str, int, str], Prompt] | None = None) -> list[Row]:
        """One repetition: a row for each network, task, method and number of shots.

        Args:
            model: the dense network.
            data: see :class:`TransferData`.
            seed: of shots and order.
            progress: see :meth:`run`.
            prompts: what was learned is put here: (network, task, shots, method) -> prompt.

        Returns:
            Rows with ``network``, ``task``, ``shots``, ``pictures`` (of each class, mean), ``method``, ``accuracy``,
            ``ece`` (both in [0, 1]).
        """
        rows: list[Row] = []
        total = (len(data.tickets) + 1) * len(data.tasks) * len(self.shots) * len(self.methods)
        with bar(f"transfer, seed {seed}", total, progress) as progress_bar:
            for network, classifier in networks(model, data.tickets):
                for task in data.tasks:
                    for shots in self.shots:
                        for name in self.methods:
                            key = (network, task.name, shots, name)
                            state = None if self.state_dir is None else Path(self.state_dir) / digest([*key, seed])
                            prompt = self.method(name, shots).optimize(task, classifier, seed=seed, state_dir=state,
                                                                       progress=False)
                            found = task.evaluate(prompt.on(classifier))
                            rows.append({"network": network, "task": task.name, "shots": shots,
                                         "pictures": prompt.info["pictures"] / len(prompt.classes), "method": name,
                                         "accuracy": float(found.score), "ece": calibration_error(
                                             found, list(task.test), prompt.classes, self.bins)})
                            if prompts is not None:
                                prompts[key] = prompt
                            progress_bar.update()
        return rows

    def run(self, subject: Any, data: TransferData | None = None, *, seed: int = 0, progress: bool | None = None,
            ) -> Report:
        """Measure the cost.

        Args:
            subject: an :class:`looseleaf_vision.ImageClassifier`, or a ``(model, processor)`` pair or pipeline that
                makes one; its weights are never touched.
            data: tasks and sparse versions; there are none built in.
            seed: the first of the seeds.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            TypeError: another subject, or other data.
            ValueError: no tasks or tickets, a ticket for another network, or a task without test examples.
        """
        model = subject if isinstance(subject, ImageClassifier) else ImageClassifier(*parts(subject, "image processor"))
        data = checked(data)
        prompts: dict[tuple[str, str, int, str], Prompt] = {}
        rows = [{**row, "seed": seed + n} for n in range(self.seeds) for row in self.measure(
            model, data, seed + n, progress=progress, prompts=prompts if n == 0 else None)]
        report = Report("What sparsity costs when a network is reused", {
            "model": model.name, "seeds": self.seeds, "epochs": self.epochs, "mapping": self.mapping})
        upstream(report, model, data)
        write_tables(report, rows)
        if "vp" in self.methods:
            most = max(self.shots, key=lambda n: n or float("inf"))
            chosen = {(network, task.name): prompts[network, task.name, most, "vp"]
                      for task in data.tasks for network in (DENSE, *data.tickets)}
            show_programs(report, model, data.tasks, chosen)
        return report


def checked(data: Any) -> TransferData:
    """``data`` where it is sound.

    Raises:
        TypeError: no :class:`TransferData`, or a ticket of another type.
        ValueError: nothing to measure, a name twice, or a task without test examples.
    """
    if not isinstance(data, TransferData):
        raise TypeError(f"data: expected TransferData(tasks, tickets), got {type(data).__name__}: there are no "
                        "built-in tasks for a network that is not known")
    names = [task.name for task in data.tasks]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"data.tasks: expected tasks with different names, got {names}")
    if not data.tickets or DENSE in data.tickets:
        raise ValueError(f"data.tickets: expected one sparse network or more, none called {DENSE!r}, got "
                         f"{list(data.tickets)}")
    for name, ticket in data.tickets.items():
        if not isinstance(ticket, Network):
            raise TypeError(f"data.tickets[{name!r}]: expected Masks, a Ticket or a network, got "
                            f"{type(ticket).__name__}")
    for task in data.tasks:
        if not len(task.test):
            raise ValueError(f"task {task.name!r}: expected test examples to measure on, got none")
    return data


def networks(model: ImageClassifier, tickets: Mapping[str, Network]) -> Iterator[tuple[str, ImageClassifier]]:
    """The dense network and each sparse one by name, one at a time; the dense weights are copied, never changed.

    Raises:
        ValueError: masks or a ticket for another network.
    """
    yield DENSE, model
    for name, ticket in tickets.items():
        network = ticket if isinstance(ticket, nn.Module) else copy.deepcopy(model.model)
        if isinstance(ticket, Masks):
            ticket.make_permanent(network)
        elif isinstance(ticket, Ticket):
            ticket.apply(network)
        yield name, ImageClassifier(network, model.preprocess, classes=model.classes)


def sparsity(network: nn.Module) -> float:
    """Fraction of zeros among the weights that pruners touch, without the first convolution, as the authors count."""
    first = next((id(m.weight) for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    counted = [p.detach() for p in prunable_parameters(network).values() if id(p) != first]
    total = sum(p.numel() for p in counted)
    return sum(int((p == 0).sum()) for p in counted) / total if total else 0.0


@torch.no_grad()
def upstream(report: Report, model: ImageClassifier, data: TransferData) -> list[Row]:
    """Add the table of the networks to a report: sparsity, and accuracy and agreement on what they were made for."""
    examples, rows, dense = list(data.upstream), list[Row](), list[int]()
    for name, classifier in networks(model, data.tickets):
        row: Row = {"network": name, "sparsity": sparsity(classifier.model), "agreement": None, "accuracy": None}
        if examples:
            with evaluating(classifier.model):
                outputs = classifier.logits(classifier.read(examples[:1])).shape[1]
            names = list(model.classes) if model.classes is not None else list(range(outputs))
            found = classifier.predictor(names).scores(examples).argmax(1).tolist()
            dense = dense or found
            row["agreement"] = fmean(a == b for a, b in zip(found, dense, strict=True))
            if all(e.target in names for e in examples):
                row["accuracy"] = fmean(names[n] == e.target for n, e in zip(found, examples, strict=True))
        rows.append(row)
    report.table("Networks", ["network", "sparsity", "upstream agreement", "upstream accuracy"],
                 [list(row.values()) for row in rows], note="sparsity without the first convolution and the head; "
                 f"upstream: {len(examples)} pictures" + ("" if examples else ", so nothing is known about it"))
    return rows


def write_tables(report: Report, rows: Sequence[Row]) -> None:
    """Add the tables of accuracy and calibration, dense against sparse, and their figures, to a report.

    Args:
        report: goes on.
        rows: of all seeds, see :meth:`TransferCost.measure`.
    """
    values: dict[tuple[str, int, str, str], list[Row]] = {}
    for row in rows:
        values.setdefault((row["task"], row["shots"], row["method"], row["network"]), []).append(row)
    table = report.table("Dense against sparse", [
        "task", "shots", "method", "network", "accuracy", "lost", "low", "high", "ECE", "ECE added", "ECE low",
        "ECE high"], note="lost: accuracy of the dense network minus this one; ECE added: this one minus the dense; "
        "means and 95 % bootstrap intervals over seeds, paired (with one seed there is no interval)")
    for (task, shots, method, network), found in values.items():
        dense = values[task, shots, method, DENSE]
        cells: list[Any] = [task, shots or "all", method, network]
        for name, sign in (("accuracy", -1), ("ece", 1)):
            gap = difference(found, dense, name, sign)
            cells.append(fmean(r[name] for r in found))
            cells += [None] * 3 if network == DENSE else [gap.value, *((gap.low, gap.high) if len(found) > 1
                                                                      else (None, None))]
        table.add(*cells)
    for task, method in dict.fromkeys((key[0], key[2]) for key in values):
        for name, label in (("accuracy", "accuracy"), ("ece", "expected calibration error")):
            lines = []
            for network in dict.fromkeys(key[3] for key in values):
                here = sorted((v for k, v in values.items() if (k[0], k[2], k[3]) == (task, method, network)),
                              key=lambda v: v[0]["pictures"])
                ends = [bootstrap([r[name] for r in v]) for v in here]
                lines.append(Series(network, [v[0]["pictures"] for v in here], [e.value for e in ends],
                                    [e.low for e in ends], [e.high for e in ends]))
            report.figure(f"{task}, {TransferCost.kinds[method]}: {label}", x_label="training pictures of each class",
                          y_label=label, x_log=True, series=lines)
    for name in ("accuracy", "ece"):
        report.arrays.update({f"{name} {task} {shots or 'all'} {method} {network}": [r[name] for r in found]
                              for (task, shots, method, network), found in values.items()})


def difference(ours: Sequence[Row], theirs: Sequence[Row], name: str, sign: int = 1) -> Interval:
    """Mean paired difference of a figure over rows, times ``sign``, with its interval."""
    return bootstrap([sign * (a[name] - b[name]) for a, b in zip(ours, theirs, strict=True)])


def show_programs(report: Report, model: ImageClassifier, tasks: Sequence[Task],
                  prompts: Mapping[tuple[str, str], Prompt]) -> None:
    """Add pictures to a report: the first test picture of each task as each network sees it."""
    for task in tasks:
        shown = {network: prompt.canvas(model, [task.test[0]])[0].movedim(0, -1)
                 for (network, name), prompt in prompts.items() if name == task.name
                 and isinstance(prompt, ReprogramPrompt)}
        grey = {n: image if image.shape[-1] == 3 else image[..., 0] for n, image in shown.items()}
        report.image(f"{task.name}: a test picture inside the learned pixels", list(grey.values()),
                     captions=list(grey))


__all__ = ["DENSE", "METHODS", "Network", "TransferCost", "TransferData", "checked", "difference", "networks",
           "show_programs", "sparsity", "upstream", "write_tables"]
