"""The probe: Gamma and Delta of a model by category, with controls."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from looseleaf import Claim, Paper, Probe, Report
from looseleaf_text import LanguageModel, LocalModel
from looseleaf.errors import did_you_mean
from looseleaf_abstract_reasoning.controls import Memoriser, Oracle
from looseleaf_abstract_reasoning.datasets import DATASETS, DRAWN
from looseleaf_abstract_reasoning.generate import CHOICES, DIGITS, SHOTS, problems
from looseleaf_abstract_reasoning.items import REMAPPINGS, Item, check_items, from_json_lines
from looseleaf_abstract_reasoning.problems import Problem
from looseleaf_abstract_reasoning.remap import render
from looseleaf_abstract_reasoning.report import write_report
from looseleaf_abstract_reasoning.scores import Mark, mark_by_likelihood, mark_by_match, pairs


@dataclasses.dataclass
class AbstractReasoningProbe(Probe):
    """Does a model apply the rule, or does it only know these symbols? (arXiv 2505.23833)

    Args:
        shots: demonstrations before each question, 4 to 50; the authors' data has 50, which takes six times as long.
        digits: most digits of decimal and other-base numbers, 3 to 9; the authors' data goes up to 9.
        per_category: problems of each category, spread evenly over its sub-datasets.
        choices: answers to choose from, 2 to 10, where scoring is by likelihood.
        scoring: likelihood: the right answer must be likelier than the wrong ones, for small models; match: the
            generated answer must equal the right one, as in the paper.
        categories: which categories; symbolic-reasoning comes with extended-calculation.
    """

    shots: int = SHOTS
    digits: int = DIGITS
    per_category: int = 32
    choices: int = CHOICES
    scoring: Literal["likelihood", "match"] = "likelihood"
    categories: tuple[str, ...] = DRAWN
    paper: ClassVar[Paper] = Paper(
        title="Benchmarking Abstract and Reasoning Abilities Through A Theoretical Perspective",
        authors=("Qingchuan Ma", "Yuhang Wu", "Xiawu Zheng", "Rongrong Ji"), year=2025, arxiv="2505.23833",
        venue="ICML 2025", code="https://github.com/MAC-AutoML/abstract-reason-benchmark",
        summary="Does my model apply the rule, or does it only know these symbols? Its accuracy after a remapping.")

    def validate(self) -> None:
        for name, low, high in (("shots", 4, 50), ("digits", 3, 9), ("per_category", 1, 1000), ("choices", 2, 10)):
            value = getattr(self, name)
            self.check(name, isinstance(value, int) and low <= value <= high, f"a whole number from {low} to {high}")
        self.check("scoring", self.scoring in ("likelihood", "match"), "'likelihood' or 'match'")
        self.check("categories", bool(self.categories) and not isinstance(self.categories, str)
                   and len(set(self.categories)) == len(self.categories), f"some of {', '.join(DRAWN)}, each once")
        for name in self.categories:
            if name not in DRAWN:
                raise ValueError(f"{type(self).__name__}.categories has {name!r}: allowed are {', '.join(DRAWN)}."
                                 + did_you_mean(name, DRAWN))

    def problems(self, seed: int = 0) -> list[Problem]:
        """The sample of problems that a run with this ``seed`` measures."""
        out = []
        for category in self.categories:
            names = [name for name, dataset in DATASETS.items() if dataset.category == category]
            # sub-datasets take turns, also from seed to seed: none has many more problems than another
            first = seed * self.per_category % len(names)
            for k, name in enumerate([*names[first:], *names[:first]]):
                share = min((self.per_category + len(names) - 1 - k) // len(names), DATASETS[name].size)
                if share:
                    out += problems(name, share, seed=seed, shots=self.shots, digits=self.digits, choices=self.choices)
        return out

    def items(self, seed: int = 0) -> list[Item]:
        """Those problems in their own symbols and in each kind of remapping."""
        return [render(problem, kind, seed) for problem in self.problems(seed)
                for kind in ("original", *problem.remappings)]

    def marks(self, model: LanguageModel, items: Sequence[Item], progress: bool | None = None) -> list[Mark]:
        """What ``model`` makes of ``items``, one mark each."""
        measure = mark_by_likelihood if self.scoring == "likelihood" else mark_by_match
        return measure(model, items, progress)

    def run(self, model: Any, data: Any = None, *, tokenizer: Any = None, seed: int = 0,
            progress: bool | None = None) -> Report:
        """Measure Gamma and Delta.

        Args:
            model: a transformers causal language model, or any :class:`looseleaf_text.LanguageModel` such as an
                :class:`looseleaf_text.EndpointModel`.
            data: items of your own: a list of :class:`Item`, or their JSON lines as one text. None: problems made
                from ``seed``.
            tokenizer: the model's; needed for a transformers model. A token for padding it need not have.
            seed: decides problems and remappings.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            ValueError: no tokenizer, or data that is no list of sound items.
        """
        made = self.problems(seed) if data is None else None
        items = self.items(seed) if data is None else _read(data)
        check_items(items)
        with language_model(model, tokenizer) as asked:
            marks = self.marks(asked, items, progress)
        report = Report("Abstract reasoning", {"model": asked.name, "items": len(items), "seed": seed,
                                               **self.parameters(), "categories": ", ".join(self.categories)})
        write_report(report, marks)
        self._controls(report, items, made, seed)
        return report

    def controls(self, items: Sequence[Item], made: Sequence[Problem] | None,
                 seed: int = 0) -> dict[str, list[Mark]]:
        """Marks of the memoriser, and of the oracle where the problems are known."""
        known: dict[str, LanguageModel] = {"memoriser": Memoriser(items)}
        if made is not None:
            known["oracle"] = Oracle.of(made, ("original", *REMAPPINGS), seed)
        return {name: self.marks(control, items, progress=False) for name, control in known.items()}

    def _controls(self, report: Report, items: Sequence[Item], made: Sequence[Problem] | None, seed: int) -> None:
        table = report.table("Controls", ["control", "remapping", "problems", "Gamma", "Delta", "Delta must be"],
                             note="models whose scores are known; any other score would be a fault of the probe")
        for name, marks in self.controls(items, made, seed).items():
            must, exact = float(name == "memoriser"), True
            for kind in REMAPPINGS:
                rows = pairs(marks, kind)
                if len(rows):
                    before, after = rows.mean(0)
                    table.add(name, kind, len(rows), float(before), float(before - after), must)
                    exact = exact and before == 1.0 and before - after == must
            report.claims.append(Claim.decide(
                exact, statement=f"Control: the {name} has Gamma 1 and Delta {must:.0f}",
                source="this project's rule", paper="not in the paper", measured="exactly so" if exact else "not so",
                rule="exactly 1 and exactly that, for each kind of remapping"))


@contextlib.contextmanager
def language_model(model: Any, tokenizer: Any = None) -> Iterator[LanguageModel]:
    """``model`` as a language model; a transformers model is in evaluation mode meanwhile."""
    if isinstance(model, LanguageModel):
        yield model
        return
    if tokenizer is None:
        raise ValueError("tokenizer=None: the probe asks questions as text, pass the model's tokenizer")
    asked = LocalModel(model, tokenizer)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield asked
    finally:
        for module in training:
            module.training = True


def _read(data: Any) -> list[Item]:
    if isinstance(data, str):
        return from_json_lines(data)
    items = list(data) if isinstance(data, (list, tuple)) else [data]
    strange = [type(item).__name__ for item in items if not isinstance(item, Item)]
    if strange:
        raise ValueError(f"data has a {strange[0]}: allowed are a list of Item, their JSON lines as one text, or None")
    return items

