"""The probe: prior-dominated or not, the instruction against likely answers, and where the prior enters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from looseleaf import Paper, Probe, Report, Series
from looseleaf import progress as progress_
from looseleaf.modes import evaluating
from looseleaf.plugin import In, OneOf
from looseleaf.probes.subject import parts
from looseleaf_prior_distribution.answers import Behaviour, behaviour, bins
from looseleaf_prior_distribution.localisation import LayerLikelihoods, ScalingEffects, locate, observe, scaling
from looseleaf_prior_distribution.tasks import TASKS, PriorTask, generate
from looseleaf_text import LocalModel, LogitLens


@dataclasses.dataclass
class PriorProbe(Probe):
    """Is a model wrong because it cannot compute the answer, or because a likelier one drowns it (arXiv 2504.12585)?

    Args:
        tasks: which of the built-in tasks: counting, acronym, shift_cipher, reversal, middle_word.
        instances: questions of each task.
        demonstrations: solved questions in each prompt.
        bins: groups of similar prior in which accuracy is shown.
        layers: how many layers to locate: those where the correlation with the prior rises most.
        scaled: questions that layers are turned down on, one layer after the other; fewer than instances, as this costs
            most.
        alpha: factor of a layer's contribution when it is turned down, in [0, 1].
        part: what is turned down: attention, mlp or both.
    """

    tasks: tuple[str, ...] = ("counting", "acronym", "middle_word")
    instances: Annotated[int, In(">= 2")] = 48
    demonstrations: Annotated[int, In(">= 0")] = 8
    bins: Annotated[int, In(">= 1")] = 4
    layers: Annotated[int, In(">= 1")] = 4
    scaled: Annotated[int, In(">= 2")] = 16
    alpha: Annotated[float, In("[0, 1]")] = 0.5
    part: Annotated[Literal["attention", "mlp", "both"], OneOf("attention", "mlp", "both")] = "both"
    paper: ClassVar[Paper] = Paper(
        title="Identifying and Mitigating the Influence of the Prior Distribution in Large Language Models",
        authors=("Liyi Zhang", "Veniamin Veselovsky", "R. Thomas McCoy", "Thomas L. Griffiths"), year=2025,
        arxiv="2504.12585",
        summary="Is a model wrong because it cannot compute the answer, or because a likelier answer drowns it?")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: one task of few questions."""
        return {"make": lambda: cls(tasks=("counting",), instances=5, demonstrations=1, scaled=3, layers=1)}

    def validate(self) -> None:
        """See :meth:`looseleaf.Plugin.validate`."""
        known = not isinstance(self.tasks, str) and all(task in TASKS for task in self.tasks)
        self.check("tasks", known and bool(self.tasks), f"one or more of {', '.join(TASKS)}")

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        """Ask the questions of every task, plainly and with the instruction, and look into the layers.

        Args:
            subject: a ``(model, tokenizer)`` pair, a text pipeline or a LocalModel; the model is a decoder of
                transformers, and its tokenizer need not have a padding token.
            data: a :class:`PriorTask`, several, or one as JSON text (``PriorTask.to_json``); None: the built-in tasks
                that the field ``tasks`` names.
            seed: of the built-in tasks and of the bootstrap.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            TypeError: another subject.
            ValueError: no tokenizer, data of another kind, a task that cannot be used, or a model whose final norm the
                lens cannot find.
        """
        model, tokenizer = parts(subject, needs="tokenizer")
        tasks = self._tasks(data, seed)
        local, lens = LocalModel(model, tokenizer), LogitLens(model)
        report = Report("Influence of the prior", {
            "tasks": ", ".join(f"{t.name} ({len(t.instances)} questions, {len(t.answers)} answers)" for t in tasks),
            "turned down on": f"{self.scaled} questions", "alpha": self.alpha, "part": self.part, "seed": seed})
        with evaluating(model):
            for task in progress_.track(tasks, "tasks", show=progress):
                plain = behaviour(local, task)
                instructed = behaviour(local, task, plain.prior, instructed=True)
                show_behaviour(report, plain, instructed, self.bins, seed)
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
            raise ValueError("data: expected None, a PriorTask, a list of them, or a task in JSON, got "
                             f"{type(data).__name__}")
        return list(found)


def show_behaviour(report: Report, plain: Behaviour, instructed: Behaviour, count: int, seed: int = 0) -> None:
    """Accuracy over the prior, plainly and with the instruction: a table and figure, slopes, and an example."""
    name = plain.task.name
    groups = bins(plain.gold_prior, [plain.correct.tolist(), instructed.correct.tolist()], count)
    report.table(f"{name}: accuracy over the prior of the right answer",
                 ["log prior", "questions", "plain prompt", "with the instruction", "gain"],
                 [[prior, n, *marks, marks[1] - marks[0]] for prior, n, marks in groups],
                 note="prior: log-likelihood after the prompt without the question, nats per token")
    xs = [prior for prior, _, _ in groups]
    report.figure(f"{name}: accuracy over the prior", x_label="log prior of the right answer, nats per token",
                  y_label="accuracy", series=[Series("plain prompt", xs, [m[0] for _, _, m in groups]),
                                              Series("with the instruction", xs, [m[1] for _, _, m in groups])])
    table = report.table(f"{name}: dominated by the prior?", [
        "prompt", "accuracy", "slope", "low", "high", "slope at equal size", "low", "high", "prior gap"],
        note="slope: logistic, per nat of prior, 95 % bootstrap over answers; above 0: dominated by the prior. prior "
             "gap: log prior of the wrong answers given less that of the right ones")
    for label, found in (("plain", plain), ("with the instruction", instructed)):
        one, two = found.slope(seed=seed), found.slope(True, seed=seed)
        if found is plain:
            report.facts[f"{name}: dominated by the prior"] = one.positive
        table.add(label, found.accuracy, *one, *two, found.prior_gap)
    wrong = [n for n, mark in enumerate(plain.correct) if not mark]
    for n in wrong[:1]:
        instance = plain.task.instances[n]
        report.examples.append((f"{name}: an error", f"{plain.task.template.replace('{input}', instance.text)} "
                                f"{plain.responses[n]} (prior {plain.prior[plain.responses[n]]:.2f}); right: "
                                f"{instance.answer} (prior {plain.prior[instance.answer]:.2f})"))


def show_layers(report: Report, name: str, layers: LayerLikelihoods, located: Sequence[int],
                scaled: ScalingEffects | None = None, alpha: float = 0.0) -> None:
    """The lens layer by layer, what turning each layer down changes, and the layers located."""
    count = len(layers.correlation)
    xs = [float(n) for n in range(count)]
    report.facts[f"{name}: located layers"] = ", ".join(map(str, located))
    table = report.table(f"{name}: layer by layer", [
        "layer", "correlation", "rise", "correlation, own answers", "right answer", "favoured wrong answer",
        "correlation, turned down", "accuracy, turned down"],
        note="correlation over questions of the log-likelihood under the logit lens with the log prior; "
             "log-likelihoods in nats per token; turned down: the model's output with the layer's contribution times "
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
    report.figure(f"{name}: logit lens", x_label="layer", y_label="log-likelihood, nats per token", series=[
        Series("right answer", xs, layers.gold.mean(1).tolist()),
        Series("favoured wrong answer", xs, layers.favoured.mean(1).tolist())])
    if scaled is not None:
        for title, found in (("correlation with the prior", scaled.correlation), ("accuracy", scaled.accuracy)):
            report.figure(f"{name}: {title} with one layer turned down", x_label="layer", y_label=title, series=[
                Series(f"contribution times {alpha:g}", xs, [found[n] for n in range(count)]),
                Series("as it is", [0.0, xs[-1]], [found[-1], found[-1]], style="line")])
