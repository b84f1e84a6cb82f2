"""The probe: what a model does without saying so, measured eight ways, each with what would look the same by chance."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np

from looseleaf import Claim, Paper, Probe, Report, Series, Table
from looseleaf import progress as progress_
from looseleaf.modes import evaluating
from looseleaf.plugin import In
from looseleaf.probes.subject import parts as subject_parts
from looseleaf.statistics import Interval, bootstrap, paired
from looseleaf_implicit_reasoning.controls import planted
from looseleaf_implicit_reasoning.data import Problem, ReasoningData, TooLittleDataError, chain, facts, prose
from looseleaf_implicit_reasoning.decoding import SoftThinking, SoftThought
from looseleaf_implicit_reasoning.loops import loop_layers
from looseleaf_implicit_reasoning.order import OrderScore, PremiseOrder, choose, demonstrate
from looseleaf_implicit_reasoning.recall import COMPARISONS, BridgeRecall, Recall
from looseleaf_implicit_reasoning.states import ChainOfEmbedding, Jump, LinearJump, StepFinding, StepProbe, is_right
from looseleaf_implicit_reasoning.taxonomy import taxonomy
from looseleaf_text import LocalModel, decoder_layers

PARTS = ("soft thinking", "pauses", "loops", "recall", "jump", "steps", "confidence", "order")
ANSWER = "Answer:"
"""Stands before the answer in worked examples."""


@dataclasses.dataclass
class ImplicitReasoningProbe(Probe):
    """Does a language model reason inside? Eight measurements with controls, on any decoder (arXiv 2509.02350).

    Args:
        parts: which measurements: soft thinking, pauses, loops, recall, jump, steps, confidence, order.
        problems: how many built-in problems, where none are given.
        probed: how many of them linear probes are fitted to and tried on.
        steps: of the built-in problems.
        order_steps: numbers of steps whose orders of premises are compared.
        demonstrations: solved problems before each question.
        pauses: filler tokens between question and answer.
        filler: their text.
        times: how often the looped layers are run.
        loop: first looped layer, and the one behind the loop; empty: the middle third.
        thoughts: soft thoughts at the beginning of the reasoning.
        max_tokens: of an answer with its reasoning.
        tokens: positions for the linear jump; 0: six for each dimension of the stream.
    """

    parts: tuple[str, ...] = PARTS
    problems: Annotated[int, In(">= 4")] = 60
    probed: Annotated[int, In(">= 4")] = 200
    steps: Annotated[int, In(">= 1")] = 2
    order_steps: Annotated[tuple[int, ...], In(">= 1")] = (1, 2, 3)
    demonstrations: Annotated[int, In(">= 0")] = 4
    pauses: Annotated[int, In(">= 0")] = 10
    filler: str = " ."
    times: Annotated[int, In(">= 1")] = 2
    loop: tuple[int, ...] = ()
    thoughts: Annotated[int, In(">= 0")] = 8
    max_tokens: Annotated[int, In(">= 1")] = 32
    tokens: Annotated[int, In(">= 0")] = 0
    paper: ClassVar[Paper] = Paper(
        title="Implicit Reasoning in Large Language Models: A Comprehensive Survey",
        authors=("Jindong Li", "Yali Fu", "Li Fan", "Jiahong Liu", "Yao Shu", "Chengwei Qin", "Menglin Yang",
                 "Irwin King", "Rex Ying"), year=2025, arxiv="2509.02350",
        code="https://github.com/digailab/awesome-llm-implicit-reasoning",
        summary="Does your model reason inside? Silent reasoning to try in a line, and probes with controls.")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: few short problems."""
        return {"make": lambda: cls(problems=8, probed=12, steps=1, order_steps=(1,), demonstrations=1, thoughts=2,
                                    max_tokens=3, pauses=2, tokens=120)}

    @classmethod
    def table(cls) -> Table:
        """The survey's map, for ``looseleaf info implicit-reasoning --table``."""
        return taxonomy()

    def validate(self) -> None:
        """See :meth:`looseleaf.Plugin.validate`."""
        self.check("parts", not isinstance(self.parts, str) and bool(self.parts) and set(self.parts) <= set(PARTS),
                   f"one or more of {', '.join(PARTS)}")
        self.check("loop", len(self.loop) in (0, 2) and all(isinstance(n, int) for n in self.loop),
                   "two layers, such as (10, 20), or ()")
        self.check("filler", bool(self.filler), "a text")

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        """Measure the parts.

        Args:
            subject: a ``(model, tokenizer)`` pair, a text pipeline or a LocalModel; the model is a decoder of
                transformers.
            data: a :class:`ReasoningData`, or its JSON; what is empty in it is not measured. None: sums of several
                steps, well-known facts of two hops, and the manual of Python. Of problems the first
                ``demonstrations`` are shown, and the others asked.
            seed: of the built-in problems, of the random labels and of the intervals.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            TypeError: another subject.
            ValueError: no tokenizer, other data, or a loop that the model has no layers for.
            UnsupportedModelError: a model that is no decoder, or does more after its layers than a norm and a head.
        """
        model, tokenizer = subject_parts(subject, needs="tokenizer")
        given = self._data(data, seed)
        local = LocalModel(model, tokenizer)
        run = _Run(self, local, given, data is None, seed, progress)
        report = Report("Implicit reasoning", {
            "problems": len(given.problems), "two-hop facts": len(given.hops), "texts": len(given.texts), "seed": seed})
        missing = []
        for name in progress_.track(self.parts, "measurements", show=progress):
            try:
                getattr(run, name.replace(" ", "_"))(report)
            except TooLittleDataError as error:
                missing.append([name, str(error)])
        if missing:
            report.table("Not measured", ["part", "why"], missing)
        known = [name for name in ("recall", "steps") if name in self.parts]
        if known:  # two parts whose answer is known for a model of ours
            report.claims.append(control_claim(seed))
        return report

    def _data(self, data: Any, seed: int) -> ReasoningData:
        if data is None:
            made = chain(self.problems + self.demonstrations, self.steps, "in order", seed)
            return ReasoningData(tuple(made), tuple(facts()), tuple(prose(400, seed)))
        if isinstance(data, str):
            return ReasoningData.from_json(data)
        if not isinstance(data, ReasoningData):
            raise ValueError(f"data: expected None, a ReasoningData or its JSON, got {type(data).__name__}")
        return data


@dataclasses.dataclass
class _Run:
    """The measurements of one run, by part; each adds what it finds to the report."""

    plugin: ImplicitReasoningProbe
    local: LocalModel
    data: ReasoningData
    built_in: bool
    seed: int
    progress: bool | None

    def _asked(self) -> tuple[list[Problem], list[Problem]]:
        """Problems that are shown, and that are asked."""
        shown = list(self.data.problems[:self.plugin.demonstrations])
        asked = list(self.data.problems[self.plugin.demonstrations:])
        if len(asked) < 2:
            raise TooLittleDataError(f"problems: expected {self.plugin.demonstrations + 2} or more, some of which are "
                                     f"shown, got {len(self.data.problems)}")
        return shown, asked

    def soft_thinking(self, report: Report) -> None:
        """Soft thoughts against tokens, where the reasoning begins."""
        plugin, (shown, asked) = self.plugin, self._asked()
        prompts = ["".join(f"{worked(p)}\n" for p in shown) + p.question for p in asked]
        right, kinds = {}, {"tokens": 0, "soft thoughts": plugin.thoughts}
        for name, thoughts in kinds.items():
            found = SoftThinking(max_thoughts=thoughts).generate(
                self.local.model, self.local.tokenizer, prompts, max_tokens=plugin.max_tokens - min(
                    thoughts, plugin.max_tokens - 1), seed=self.seed, progress=self.progress)
            right[name] = [float(is_right(said(t.text), p.answer)) for t, p in zip(found, asked, strict=True)]
        show_soft(report, right, found, self.seed)

    def pauses(self, report: Report) -> None:
        """Filler tokens before the answer against none."""
        shown, asked = self._asked()
        self._compared(report, "Filler tokens", {
            "none": lambda: self._answers(shown, asked),
            f"{self.plugin.pauses} x {self.plugin.filler!r}": lambda: self._answers(
                shown, asked, self.plugin.filler * self.plugin.pauses)})

    def loops(self, report: Report) -> None:
        """Layers that are run several times against once."""
        shown, asked = self._asked()
        count = len(decoder_layers(self.local.model))
        i, j = self.plugin.loop or (count // 3, max(count // 3 + 1, 2 * count // 3))

        def looped() -> list[float]:
            with loop_layers(self.local.model, i, j, self.plugin.times):
                # a model of its own: how rows may be batched is asked of the deeper one
                return self._answers(shown, asked, local=LocalModel(self.local.model, self.local.tokenizer))

        self._compared(report, "Looped layers", {"once": lambda: self._answers(shown, asked),
                                                 f"layers {i} to {j - 1}, {self.plugin.times} times": looped})

    def _answers(self, shown: Sequence[Problem], asked: Sequence[Problem], after: str = "",
                 local: LocalModel | None = None) -> list[float]:
        answers = sorted({p.answer for p in self.data.problems})
        text = "".join(f"{p.question}{after} {p.answer}\n" for p in shown)
        with evaluating(self.local.model):
            given = choose(local or self.local, asked, answers, text, after)
        return [float(a == p.answer) for a, p in zip(given, asked, strict=True)]

    def _compared(self, report: Report, title: str, ways: dict[str, Callable[[], list[float]]]) -> None:
        answers = [p.answer for p in self._asked()[1]]
        found = {name: way() for name, way in ways.items()}
        first = next(iter(found.values()))
        report.table(title, ["way", "accuracy", "low", "high", "gain", "gain low", "gain high"], [
            [name, *bootstrap(values, self.seed), *(paired(values, first, self.seed) if values is not first else
                                                    (None, None, None))] for name, values in found.items()],
            note=f"likeliest of {len(set(answers))} answers, {len(answers)} problems; the most frequent answer alone: "
                 f"{max(map(answers.count, answers)) / len(answers):.3f}")

    def recall(self, report: Report) -> None:
        """The bridge of two-hop facts."""
        show_recall(report, BridgeRecall().measure(self.local.model, self.local.tokenizer, self.data.hops,
                                                   seed=self.seed, progress=self.progress), self.seed)

    def jump(self, report: Report) -> None:
        """Linear maps to the last layer."""
        show_jump(report, LinearJump(tokens=self.plugin.tokens).measure(
            self.local.model, self.local.tokenizer, self.data.texts, seed=self.seed, progress=self.progress))

    def steps(self, report: Report) -> None:
        """Linear probes of intermediate results."""
        problems = chain(self.plugin.probed, self.plugin.steps, seed=self.seed) if self.built_in else self.data.problems
        show_steps(report, StepProbe().measure(self.local.model, self.local.tokenizer, problems, seed=self.seed,
                                               progress=self.progress))

    def confidence(self, report: Report) -> None:
        """Right and wrong answers by their hidden states."""
        shown, asked = self._asked()
        text = demonstrate(shown)
        found = ChainOfEmbedding(max_tokens=min(8, self.plugin.max_tokens)).measure(
            self.local.model, self.local.tokenizer, [text + p.question for p in asked], [p.answer for p in asked],
            progress=self.progress)
        table = report.table("Right or wrong, from the states", ["score", "AUROC", "low", "high"],
                             note=f"{sum(found.right)} of {len(found.right)} answers are right; 95 % bootstrap over "
                                  "answers; 0.5 is chance; -: all right or all wrong")
        for name in found.scores:
            table.add(name, *(found.auroc(name, self.seed) or (None, None, None)))

    def order(self, report: Report) -> None:
        """Premises in other orders."""
        show_order(report, PremiseOrder(tuple(self.plugin.order_steps), self.plugin.problems,
                                        self.plugin.demonstrations).measure(
            self.local.model, self.local.tokenizer, seed=self.seed), self.seed)


def curve(name: str, x: Sequence[float], values: Sequence[Interval]) -> Series:
    """A line with its intervals."""
    return Series(name, [float(v) for v in x], [v.value for v in values], [v.low for v in values],
                  [v.high for v in values])


def worked(problem: Problem) -> str:
    """A problem with its steps in words, and the answer."""
    return f"{problem.question} {' '.join((*problem.steps, ANSWER))} {problem.answer}"


def said(text: str) -> str:
    """What a text says is the answer; all of it where there are no such words."""
    return text.partition(ANSWER)[2] or text


def show_soft(report: Report, right: dict[str, list[float]], thoughts: Sequence[SoftThought], seed: int) -> None:
    """Accuracy with and without soft thoughts, and how soft they are."""
    tops = [w for t in thoughts for w in t.top]
    rows = list(right.items())
    report.table("Soft thinking", ["reasoning begins with", "accuracy", "low", "high", "weight of the top token",
                                   "thoughts above 0.9"], [
        [name, *bootstrap(values, seed), float(np.mean(tops)) if tops and name != rows[0][0] else None,
         float(np.mean(np.array(tops) > 0.9)) if tops and name != rows[0][0] else None] for name, values in rows],
        note="a thought whose top token has nearly all the weight is that of greedy decoding")
    if thoughts and thoughts[0].thoughts:
        report.strip("The first problem's soft thoughts", list(thoughts[0].thoughts), list(thoughts[0].top),
                     [False] * len(thoughts[0].top), note="likeliest tokens, shaded by their weight")


def show_recall(report: Report, found: Recall, seed: int = 0) -> None:
    """Recall by layer, against its comparisons."""
    layers = [float(n) for n in range(len(found.recall))]
    fractions = {name: [found.fraction(name, n, seed) for n in range(len(layers))] for name in COMPARISONS}
    columns = ["layer", "log p of the bridge", *COMPARISONS, "more recall, more consistent"]
    table = report.table("Recall of the bridge", columns,
                         note=f"{len(found.facts)} facts, {len(found.left_out)} left out; fractions of facts in which "
                              "the bridge is recalled more than with another entity, with another relation, or after "
                              "the last word alone; of another bridge under the same exchange (a control); and in "
                              "which moving towards more recall makes the answer more like that to one hop. "
                              "Chance is 0.5 throughout")
    for n in range(len(layers)):
        table.add(n, float(found.recall[n].mean()), *(f and f.value for f in (fractions[c][n] for c in COMPARISONS)),
                  found.positive(n, seed).value if n < len(found.slope) else None)
    report.facts["bridge recalled from layer"] = found.first_layer()
    report.facts["consistency of two hops with one"] = float(found.consistency.mean())
    report.figure("Recall of the bridge", x_label="layer", y_label="fraction of facts", series=[
        curve(name, layers, [f for f in line if f]) for name, line in fractions.items() if None not in line],
        note="95 % bootstrap over facts; chance 0.5")


def show_jump(report: Report, found: Jump) -> None:
    """How linear the way to the end is, by layer."""
    rows = list(zip(found.r2, found.identity_r2, *([i.value for i in line] for line in (
        found.agreement, found.identity_agreement, found.shuffled_agreement)), strict=True))
    report.table("Linear jump to the last layer", [
        "after layer", "R2 of the map", "R2 of the layer itself", "same top token, map", "same top token, itself",
        "same top token, shuffled"], [[n - 1, *row] for n, row in enumerate(rows)],
        note=f"fitted to {found.positions[0]} positions, tried on {found.positions[1]} of other texts; -1 is what the "
             "first layer reads; shuffled: fitted to the ends of other positions")
    report.figure("Linear jump to the last layer", x_label="layers run", y_label="same top token", series=[
        curve(name, range(len(line)), line) for name, line in (
            ("linear map", found.agreement), ("the layer itself", found.identity_agreement),
            ("map to shuffled ends", found.shuffled_agreement))])


def show_steps(report: Report, found: StepFinding) -> None:
    """Where each intermediate result can be read off."""
    steps, _, positions = found.accuracy.shape
    table = report.table("Intermediate results", [
        "step", "position", "found after layer", "best accuracy", "random labels there", "most frequent",
        "most frequent after the word"],
        note=f"linear probes fitted to {found.problems[0]} problems and tried on {found.problems[1]}; positions are "
             "the ends of the premises and of the question; found: the probe beats all three controls (sign tests, "
             "over all layers and positions together); layer -1 is what the first layer reads")
    for k in range(steps):
        for place in range(positions):
            best = int(found.accuracy[k, :, place].argmax())
            table.add(k + 1, place + 1, found.first_layer(k, place), float(found.accuracy[k, best, place]),
                      float(found.control[k, best, place]), float(found.frequency[k]), float(found.last_word[k, place]))
    report.figure("Intermediate results: accuracy minus that with random labels", x_label="position",
                  y_label="layers run", panels={f"step {k + 1}": found.selectivity[k].tolist() for k in range(steps)})


def show_order(report: Report, scores: Sequence[OrderScore], seed: int = 0) -> None:
    """Accuracy by order of premises and number of steps."""
    report.table("Order of the premises", ["premises", "steps", "accuracy", "low", "high", "most frequent answer",
                                           "last number"],
                 [[s.order, s.steps, *s.accuracy(seed), s.frequency, s.last_number] for s in scores],
                 note=f"likeliest digit, {len(scores[0].right)} problems each with the same numbers; subtrahend: each "
                      "step takes the variable away from a number")
    report.figure("Order of the premises", x_label="steps", y_label="accuracy", series=[
        curve(order, [s.steps for s in line], [s.accuracy(seed) for s in line])
        for order in dict.fromkeys(s.order for s in scores) if (line := [s for s in scores if s.order == order])])


@functools.lru_cache(maxsize=4)
def control_claim(seed: int = 0) -> Claim:
    """What the probe finds on a model whose layers are known; where this fails nothing else can be trusted."""
    model, tokenizer, hops, problems = planted(seed=seed)
    recalled = BridgeRecall(slope=False).measure(model, tokenizer, hops, seed=seed, progress=False).first_layer()
    result = StepProbe().measure(model, tokenizer, problems, seed=seed, progress=False)
    places = [result.first_layer(0, place) for place in range(2)]
    return Claim.decide(recalled == 2 and places == [2, None],
                        statement="On a planted two-hop model the bridge is found in its layer, and only where it is",
                        source="this project's control", paper="-",
                        measured=f"recall from layer {recalled}; linear probe at the mention from layer {places[0]}, "
                                 f"at the end of the question from layer {places[1]}",
                        rule="recall and linear probe from layer 2; None at the end of the question")
