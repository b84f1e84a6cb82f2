"""The probe: Gamma and Delta of a model by category, with controls."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from looseleaf import Claim, Paper, Probe, Report
from looseleaf.errors import did_you_mean
from looseleaf.modes import evaluating
from looseleaf.plugin import In
from looseleaf.probes.subject import parts
from looseleaf_abstract_reasoning.controls import Memoriser, Oracle
from looseleaf_abstract_reasoning.datasets import CHOICES, DATASETS, DIGITS, DRAWN, SHOTS, problems
from looseleaf_abstract_reasoning.items import KINDS, REMAPPINGS, Item, Problem, check_items, from_json_lines, render
from looseleaf_abstract_reasoning.scores import Score, pairs, score_by_likelihood, score_by_match, write_report
from looseleaf_text import LanguageModel, LocalModel


@dataclasses.dataclass
class AbstractReasoningProbe(Probe):
    """Does a model apply the rule, or does it only know these symbols? (arXiv 2505.23833)

    Args:
        shots: demonstrations before each question, 4 to 50; the authors' data has 50, which takes six times as long.
        digits: most digits of decimal and other-base numbers, 3 to 9; the authors' data goes up to 9.
        per_category: problems of each category, 1 to 1000, spread evenly over its sub-datasets.
        choices: answers to choose from, 2 to 10, where scoring is by likelihood.
        scoring: likelihood: the right answer must be likelier than the wrong ones, for small models; match: the
            generated answer must equal the right one, as in the paper.
        categories: which categories; symbolic-reasoning comes with extended-calculation.
    """

    shots: Annotated[int, In("[4, 50]")] = SHOTS
    digits: Annotated[int, In("[3, 9]")] = DIGITS
    per_category: Annotated[int, In("[1, 1000]")] = 32
    choices: Annotated[int, In("[2, 10]")] = CHOICES
    scoring: Literal["likelihood", "match"] = "likelihood"
    categories: tuple[str, ...] = DRAWN
    paper: ClassVar[Paper] = Paper(
        title="Benchmarking Abstract and Reasoning Abilities Through A Theoretical Perspective",
        authors=("Qingchuan Ma", "Yuhang Wu", "Xiawu Zheng", "Rongrong Ji"), year=2025, arxiv="2505.23833",
        venue="ICML 2025", code="https://github.com/MAC-AutoML/abstract-reason-benchmark",
        summary="Does my model apply the rule, or does it only know these symbols? Its accuracy after a remapping.")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: few problems with few demonstrations."""
        return {"make": lambda: cls(shots=4, per_category=2)}

    def validate(self) -> None:
        """See :meth:`looseleaf.Plugin.validate`."""
        names = () if isinstance(self.categories, str) else self.categories
        hint = next((did_you_mean(name, DRAWN) for name in names if name not in DRAWN), "")
        if not names or len(set(names)) != len(names) or not set(names) <= set(DRAWN):
            raise ValueError(f"{type(self).__name__}.categories: expected some of {', '.join(DRAWN)}, each once, got "
                             f"{self.categories!r}.{hint}")

    def problems(self, seed: int = 0) -> list[Problem]:
        """The sample of problems that a run with this ``seed`` measures."""
        out = []
        for category in self.categories:
            names = [name for name, dataset in DATASETS.items() if dataset.category == category]
            # sub-datasets take turns, also from seed to seed: none has many more problems than another
            first = seed * self.per_category % len(names)
            for k, name in enumerate([*names[first:], *names[:first]]):
                count = min((self.per_category + len(names) - 1 - k) // len(names), DATASETS[name].size)
                if count:
                    out += problems(name, count, seed=seed, shots=self.shots, digits=self.digits, choices=self.choices)
        return out

    def items(self, seed: int = 0) -> list[Item]:
        """Those problems in their own symbols and in each kind of remapping."""
        return [render(problem, kind, seed) for problem in self.problems(seed)
                for kind in ("original", *problem.remappings)]

    def score(self, model: LanguageModel, items: Sequence[Item], progress: bool | None = None) -> list[Score]:
        """One score for each of ``items``, in their order, by ``scoring``."""
        measure = score_by_likelihood if self.scoring == "likelihood" else score_by_match
        return measure(model, items, progress)

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        """Measure Gamma and Delta.

        Args:
            subject: a ``(model, tokenizer)`` pair, a text pipeline, or any :class:`looseleaf_text.LanguageModel` such
                as an :class:`looseleaf_text.EndpointModel`; the model is a causal language model of transformers, and
                its tokenizer need not have a padding token.
            data: items of your own: a list of :class:`Item`, or their JSON lines as one text. None: problems made
                from ``seed``.
            seed: decides problems and remappings.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            TypeError: another subject.
            ValueError: no tokenizer, or data that is no list of sound items.
        """
        model = subject if isinstance(subject, LanguageModel) else LocalModel(*parts(subject, needs="tokenizer"))
        originals = self.problems(seed) if data is None else None
        items = self.items(seed) if data is None else _read(data)
        check_items(items)
        with evaluating(getattr(model, "model", None)):  # an EndpointModel's is a name and has no modes
            scores = self.score(model, items, progress)
        report = Report("Abstract reasoning", {"model": model.name, "items": len(items), "seed": seed,
                                               **self.hyperparameters(), "categories": ", ".join(self.categories)})
        write_report(report, scores)
        _add_controls(report, self.controls(items, originals, seed))
        return report

    def controls(self, items: Sequence[Item], originals: Sequence[Problem] | None,
                 seed: int = 0) -> dict[str, list[Score]]:
        """Scores of the memoriser, and of the oracle where the problems are known.

        Args:
            items: what is asked.
            originals: the problems that ``items`` were rendered from with ``seed``; None: not known.
            seed: of the remappings.
        """
        models: dict[str, LanguageModel] = {"memoriser": Memoriser(items)}
        if originals is not None:
            models["oracle"] = Oracle.of(originals, KINDS, seed)
        return {name: self.score(model, items, progress=False) for name, model in models.items()}


def control_rows(controls: Mapping[str, Sequence[Score]]) -> list[list[Any]]:
    """What controls got: control, remapping, problems, Gamma, Delta, and what Delta must be.

    Args:
        controls: as from :meth:`AbstractReasoningProbe.controls`.

    Returns:
        A row for each control and each kind of remapping that occurs.
    """
    rows: list[list[Any]] = []
    for name, scores in controls.items():
        for kind in REMAPPINGS:
            both = pairs(scores, kind)
            if len(both):
                before, after = both.mean(0)
                rows.append([name, kind, len(both), float(before), float(before - after), float(name == "memoriser")])
    return rows


def _add_controls(report: Report, controls: Mapping[str, Sequence[Score]]) -> None:
    rows = control_rows(controls)
    report.table("Controls", ["control", "remapping", "problems", "Gamma", "Delta", "Delta must be"], rows,
                 note="models whose scores are known; any other score would be a fault of the probe")
    for name in controls:
        exact = all(gamma == 1.0 and delta == must for control, *_, gamma, delta, must in rows if control == name)
        report.claims.append(Claim.decide(
            exact, statement=f"Control: the {name} has Gamma 1 and Delta {name == 'memoriser':d}",
            source="this project's rule", paper="not in the paper", measured="exactly so" if exact else "not so",
            rule="exactly 1 and exactly that, for each kind of remapping"))


def _read(data: Any) -> list[Item]:
    if isinstance(data, str):
        return from_json_lines(data)
    items = list(data) if isinstance(data, (list, tuple)) else [data]
    strange = [type(item).__name__ for item in items if not isinstance(item, Item)]
    if strange:
        raise ValueError("data: expected None, a list of Item, or their JSON lines as one text, got one with "
                         f"{strange[0]}")
    return items
