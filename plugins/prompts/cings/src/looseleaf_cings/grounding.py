"""How much a model answers from what it is given, and how much from memory."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from looseleaf import Example, Predictor, Report, Series
from looseleaf.prompts.prompt import storable
from looseleaf.statistics import Interval, bootstrap, paired
from looseleaf_cings.optimizer import GroundedPredictor, GroundedPrompt
from looseleaf_text.slots import fill, slots


@storable
@dataclasses.dataclass(frozen=True)
class Fact:
    """A question whose answer a model may know, and passages that say so, say something else, or say nothing of it.

    Attributes:
        question: asked as the instruction.
        answers: the right answer and its other spellings.
        conflicting: a passage that names another answer.
        conflicting_answers: that answer and its other spellings.
        supporting: a passage that names the right answer; empty: none.
        irrelevant: a passage about something else; empty: none.
    """

    question: str
    answers: tuple[str, ...]
    conflicting: str
    conflicting_answers: tuple[str, ...]
    supporting: str = ""
    irrelevant: str = ""

    def __post_init__(self) -> None:
        for name in ("answers", "conflicting_answers"):
            if isinstance(getattr(self, name), str) or not any(map(normalized, getattr(self, name))):
                raise ValueError(f"Fact.{name}: expected a sequence of one or more texts, got {getattr(self, name)!r}")
        if {normalized(a) for a in self.answers} & {normalized(a) for a in self.conflicting_answers}:
            raise ValueError(f"Fact.conflicting_answers: expected others than the answers {self.answers!r}, got "
                             f"{self.conflicting_answers!r}")


def normalized(text: str) -> str:
    """Lower case, without accents, punctuation and English articles, words apart by one space."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).casefold()
    return " ".join(word for word in re.findall(r"\w+", plain) if word not in ("a", "an", "the"))


def names(text: str, answers: Sequence[str]) -> bool:
    """Whether a text holds one of the answers as whole words, :func:`normalized`; a refusal holds none."""
    words = f" {normalized(text)} "
    return any(f" {normalized(answer)} " in words for answer in answers if normalized(answer))


MEASURES = {
    "follows a conflicting context": "conflicting", "memory against a conflicting context": "conflicting",
    "right with a supporting context": "supporting", "right with an irrelevant context": "irrelevant",
    "right without context": ""}
"""What is measured -> which passage of a :class:`Fact` is given."""
FOLLOWS, MEMORY, SUPPORTED, IRRELEVANT, ALONE = MEASURES


def grounding(predictor: Predictor, facts: Sequence[Fact]) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
    """What :func:`grounding_report` counts: of each measure 1 or 0 for each fact, and the answers given.

    Facts without a passage are left out of the measures that need it.
    """
    hits: dict[str, list[float]] = {}
    answers: dict[str, list[str]] = {}
    for measure, passage in MEASURES.items():
        own = [f for f in facts if not passage or getattr(f, passage)]
        if own:
            if passage not in answers:
                answers[passage] = [str(a) for a in predictor.predict([
                    Example({"instruction": f.question, **({"context": getattr(f, passage)} if passage else {})})
                    for f in own])]
            hits[measure] = [float(names(a, f.conflicting_answers if measure == FOLLOWS else f.answers))
                             for a, f in zip(answers[passage], own, strict=True)]
    return hits, {passage or "none": given for passage, given in answers.items()}


def grounding_report(models: Any, facts: Sequence[Fact], *, prose: Sequence[str] = (), shown: int = 5) -> Report:
    """How much one or several models answer from what they are given, and how much from memory.

    Args:
        models: a :class:`looseleaf_text.LocalModel` or :func:`context_aware` one, which reads the context at the
            beginning of the assistant's turn; any predictor of texts for the inputs ``instruction`` and ``context``
            (so that servers and pipelines of your own can be measured), or ``prompt.on(model)`` of a
            :class:`GroundedPrompt`, whatever its template; or name -> one of these. Differences are from the first.
        facts: best those that the model answers rightly without context.
        prose: texts whose perplexity is measured too, where the predictor has ``perplexity``.
        shown: of how many facts the answers are listed.

    Returns:
        Fractions with 95 % bootstrap intervals over facts, paired differences, a figure and examples.

    Raises:
        ValueError: no facts, or something else in their place.
    """
    if not facts or not all(isinstance(f, Fact) for f in facts):
        raise ValueError(f"facts: expected one or more Fact, got {list(facts)[:1] or 'none'}")
    given = models if isinstance(models, Mapping) else {"model": models}
    predictors = {name: _asked(m) if isinstance(m, Predictor) else GroundedPrompt().on(m) for name, m in given.items()}
    results = {name: grounding(predictor, facts) for name, predictor in predictors.items()}
    first = next(iter(results))
    report = Report("Grounding: does the model answer from the context?", facts={"facts": len(facts)})
    add_fractions(report, {name: {m: bootstrap(v) for m, v in hits.items()} for name, (hits, _) in results.items()})
    if len(results) > 1:
        table = report.table(f"Difference from {first}", ["measure", "model", "difference", "low", "high"],
                             note="paired over facts; bootstrap, 95 %")
        for name, (hits, _) in list(results.items())[1:]:
            for measure, values in hits.items():
                table.add(measure, name, *paired(values, results[first][0][measure]))
    readers = {name: p for name, p in predictors.items() if hasattr(p, "perplexity")}
    if prose and readers:
        table = report.table("Perplexity on prose", ["model", "perplexity"], note="lower is better")
        for name, reader in readers.items():
            table.add(name, reader.perplexity(prose))
    if shown:
        table = report.table("Answers to a conflicting context",
                             ["question", "the context's answer", "the answer from memory", *results])
        for n, fact in enumerate(facts[:shown]):
            table.add(fact.question, fact.conflicting_answers[0], fact.answers[0],
                      *(answers["conflicting"][n].strip() for _, answers in results.values()))
    return report


def _asked(predictor: Predictor) -> Predictor:
    """The predictor of a grounded prompt with the question of a fact where its template has its only slot."""
    if not isinstance(predictor, GroundedPredictor):
        return predictor
    prompt = predictor.grounded
    inputs = slots(prompt.template)
    template = fill(prompt.template, {inputs[0]: "{instruction}"}) if len(inputs) == 1 else "{instruction}"
    return dataclasses.replace(prompt, template=template, context="context", labels=None).on(predictor.model)


def add_fractions(report: Report, rows: Mapping[str, Mapping[str, Interval]]) -> None:
    """Add a table and a figure of the measures: model -> measure -> fraction."""
    table = report.table("Fractions of answers", ["measure", "model", "fraction", "low", "high"],
                         note="bootstrap, 95 %")
    measures = list(dict.fromkeys(m for row in rows.values() for m in row))
    for measure in measures:
        for name, row in rows.items():
            table.add(measure, name, *row[measure])
    shift = 0.6 / max(1, len(rows))
    series = []
    for k, (name, row) in enumerate(rows.items()):
        intervals = [row[m] for m in measures]
        series.append(Series(name, [n + 1 + shift * (k - (len(rows) - 1) / 2) for n in range(len(measures))],
                             [i.value for i in intervals], [i.low for i in intervals], [i.high for i in intervals],
                             "points"))
    report.figure("Fractions of answers", series=series, y_label="fraction",
                  x_label=", ".join(f"{n + 1} {m}" for n, m in enumerate(measures)))
