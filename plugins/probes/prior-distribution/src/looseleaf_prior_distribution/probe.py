"""The probe: prior-dominated or not, the instruction against likely answers, and where the prior enters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from looseleaf import Paper, Probe, Report, Series
from looseleaf_text import LocalModel, LogitLens
from looseleaf import progress as progress_
from looseleaf_prior_distribution.answers import Behaviour, behaviour
from looseleaf_prior_distribution.generators import TASKS, generate
from looseleaf_prior_distribution.localisation import Layers, Scaled, locate, observe, scaling
from looseleaf_prior_distribution.statistics import bins
from looseleaf_prior_distribution.tasks import PriorTask
from looseleaf_prior_distribution.tuning import evaluating

PARTS = ("attention", "mlp", "both")


@dataclasses.dataclass
class PriorProbe(Probe):
    """Is a model wrong because it cannot compute the answer, or because a likelier one drowns it (arXiv 2504.12585)?

    Args:
        tasks: which of the built-in tasks: counting, acronym, shift_cipher, reversal, middle_word.
        instances: questions of each task.
        demonstrations: solved questions in each prompt.
        bins: groups of like prior in which accuracy is shown.
        layers: how many layers to locate: those where the correlation with the prior rises most.
        scaled: questions that layers are turned down on, one layer after the other; fewer than instances, as this costs
            most.
        alpha: factor of a layer's contribution when it is turned down, 0 to 1.
        part: what is turned down: attention, mlp or both.
    """

    tasks: tuple[str, ...] = ("counting", "acronym", "middle_word")
    instances: int = 48
    demonstrations: int = 8
    bins: int = 4
    layers: int = 4
    scaled: int = 16
    alpha: float = 0.5
    part: Literal["attention", "mlp", "both"] = "both"
    paper: ClassVar[Paper] = Paper(
        title="Identifying and Mitigating the Influence of the Prior Distribution in Large Language Models",
        authors=("Liyi Zhang", "Veniamin Veselovsky", "R. Thomas McCoy", "Thomas L. Griffiths"), year=2025,
        arxiv="2504.12585",
        summary="Is a model wrong because it cannot compute the answer, or because a likelier answer drowns it?")

    def validate(self) -> None:
        known = not isinstance(self.tasks, str) and all(task in TASKS for task in self.tasks)
        self.check("tasks", known and bool(self.tasks), f"one or more of {', '.join(TASKS)}")
        self.check("instances", isinstance(self.instances, int) and self.instances >= 2, "a whole number from 2")
        self.check("demonstrations", isinstance(self.demonstrations, int) and self.demonstrations >= 0,
                   "a whole number from 0")
        self.check("bins", isinstance(self.bins, int) and self.bins >= 1, "a whole number from 1")
        self.check("layers", isinstance(self.layers, int) and self.layers >= 1, "a whole number from 1")
        self.check("scaled", isinstance(self.scaled, int) and self.scaled >= 2, "a whole number from 2")
        self.check("alpha", 0 <= self.alpha <= 1, "a number from 0 to 1")
        self.check("part", self.part in PARTS, f"one of {', '.join(PARTS)}")

    def run(self, model: Any, data: Any = None, *, tokenizer: Any = None, seed: int = 0,
            progress: bool | None = None) -> Report:
        """Ask the questions of every task, plainly and with the instruction, and look into the layers.

        Args:
            model: a decoder of transformers.
            data: a :class:`PriorTask`, several, or one as JSON text (``PriorTask.to_json``); None: the built-in tasks
                that the field ``tasks`` names.
            tokenizer: the model's; needed. It need not have a padding token.
            seed: of the built-in tasks and of the bootstrap.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            ValueError: no tokenizer, data of another kind, a task that cannot be used, or a model whose final norm the
                lens cannot find.
        """
        if tokenizer is None:
            raise ValueError("tokenizer=None: the tasks are text, pass the model's tokenizer")
        tasks = self._tasks(data, seed)
        local, lens = LocalModel(model, tokenizer), LogitLens(model)
        report = Report("Influence of the prior", {
            "tasks": ", ".join(f"{t.name} ({len(t.instances)} questions, {len(t.answers)} answers)" for t in tasks),
            "turned down on": f"{self.scaled} questions", "alpha": self.alpha, "part": self.part, "seed": seed})
        with evaluating(model):
            for task in progress_.track(tasks, "tasks", show=progress):
                plain = behaviour(local, task)
                careful = behaviour(local, task, plain.prior, careful=True)
                show_behaviour(report, plain, careful, self.bins, seed)
                layers = observe(local, lens, task, plain.prior, plain.responses)
                located = locate(layers.correlation.tolist(), min(self.layers, len(lens.names)))
                part = task.part(task.instances[:self.scaled])
                scaled = scaling(local, part, plain.prior, self.alpha, part=self.part, progress=progress)
                show_layers(report, task.name, layers, located, scaled, self.alpha)
        return report

    def _tasks(self, data: Any, seed: int) -> list[PriorTask]:
        if data is None:
            return [generate(name, self.instances, seed=seed, demonstrations=self.demonstrations)
                    for name in self.tasks]
        if isinstance(data, str):
            return [PriorTask.from_json(data)]
        found = [data] if isinstance(data, PriorTask) else data
        if not isinstance(found, Sequence) or not found or not all(isinstance(t, PriorTask) for t in found):
            raise ValueError(f"data is {type(data).__name__}: allowed is None, a PriorTask, a list of them, or a task "
                             "in JSON")
        return list(found)


def show_behaviour(report: Report, plain: Behaviour, careful: Behaviour, count: int, seed: int = 0) -> None:
    """Accuracy over the prior, plainly and with the instruction: a table and figure, slopes, and an example."""
    name = plain.task.name
    groups = bins(plain.gold_prior, [plain.correct.tolist(), careful.correct.tolist()], count)
    report.table(f"{name}: accuracy over the prior of the right answer",
                 ["log prior", "questions", "plain prompt", "with the instruction", "gain"],
                 [[prior, n, *marks, marks[1] - marks[0]] for prior, n, marks in groups],
                 note="prior: log-likelihood after the prompt without the question, nats a token")
    xs = [prior for prior, _, _ in groups]
    report.figure(f"{name}: accuracy over the prior", x_label="log prior of the right answer, nats a token",
                  y_label="accuracy", series=[Series("plain prompt", xs, [m[0] for _, _, m in groups]),
                                              Series("with the instruction", xs, [m[1] for _, _, m in groups])])
    table = report.table(f"{name}: dominated by the prior?", [
        "prompt", "accuracy", "slope", "low", "high", "slope at equal size", "low", "high", "pull"],
        note="slope: logistic, per nat of prior, 95 % bootstrap over answers; above 0: dominated by the prior. pull: "
             "log prior of the wrong answers given less that of the right ones")
    for label, found in (("plain", plain), ("with the instruction", careful)):
        one, two = found.slope(seed=seed), found.slope(True, seed=seed)
        if found is plain:
            report.facts[f"{name}: dominated by the prior"] = one.positive
        table.add(label, found.accuracy, one.value, one.low, one.high, two.value, two.low, two.high, found.pull)
    wrong = [n for n, mark in enumerate(plain.correct) if not mark]
    for n in wrong[:1]:
        instance = plain.task.instances[n]
        report.examples.append((f"{name}: an error", f"{plain.task.template.replace('{input}', instance.text)} "
                                f"{plain.responses[n]} (prior {plain.prior[plain.responses[n]]:.2f}); right: "
                                f"{instance.answer} (prior {plain.prior[instance.answer]:.2f})"))


def show_layers(report: Report, name: str, layers: Layers, located: Sequence[int], scaled: Scaled | None = None,
                alpha: float = 0.0) -> None:
    """The lens layer by layer, what turning each layer down changes, and the layers located."""
    count = len(layers.correlation)
    xs = [float(n) for n in range(count)]
    report.facts[f"{name}: located layers"] = ", ".join(map(str, located))
    table = report.table(f"{name}: layer by layer", [
        "layer", "correlation", "rise", "correlation, own answers", "right answer", "favoured wrong answer",
        "correlation, turned down", "accuracy, turned down"],
        note="correlation over questions of the log-likelihood under the logit lens with the log prior; "
             "log-likelihoods in nats a token; turned down: the model's output with the layer's contribution times "
             f"{alpha:g}, accuracy against the wrong answers with the highest prior")
    before = 0.0
    for n in range(count):
        now = float(layers.correlation[n])
        table.add(n, now, now - before, float(layers.response_correlation[n]), float(layers.gold[n].mean()),
                  float(layers.favoured[n].mean()), *((scaled.correlation[n], scaled.accuracy[n]) if scaled else
                                                      (None, None)))
        before = now
    report.figure(f"{name}: correlation with the prior", x_label="layer", y_label="correlation over questions", series=[
        Series("right answers", xs, layers.correlation.tolist()),
        Series("own answers", xs, layers.response_correlation.tolist()),
        Series("located", [float(n) for n in located], [float(layers.correlation[n]) for n in located],
               style="points")])
    report.figure(f"{name}: logit lens", x_label="layer", y_label="log-likelihood, nats a token", series=[
        Series("right answer", xs, layers.gold.mean(1).tolist()),
        Series("favoured wrong answer", xs, layers.favoured.mean(1).tolist())])
    if scaled is not None:
        for title, found in (("correlation with the prior", scaled.correlation), ("accuracy", scaled.accuracy)):
            report.figure(f"{name}: {title} with one layer turned down", x_label="layer", y_label=title, series=[
                Series(f"contribution times {alpha:g}", xs, [found[n] for n in range(count)]),
                Series("as it is", [0.0, xs[-1]], [found[-1], found[-1]], style="line")])


__all__ = ["PriorProbe", "show_behaviour", "show_layers"]
