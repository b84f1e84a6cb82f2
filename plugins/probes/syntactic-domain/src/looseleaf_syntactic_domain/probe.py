"""The probe: accuracy in a domain's own sentence patterns and in those of others, and what a model goes by."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from looseleaf import Paper, Probe, Report, Series
from looseleaf.modes import evaluating
from looseleaf.plugin import In, OneOf
from looseleaf.probes.subject import parts
from looseleaf.report import Cell
from looseleaf.statistics import Interval
from looseleaf_syntactic_domain.audit import Texts, cues, spurious
from looseleaf_syntactic_domain.facts import DomainFacts, countries
from looseleaf_syntactic_domain.scores import (
    Answers,
    ask,
    behaviour,
    domain_risk,
    select_templates,
    shuffled_gaps,
    template_matrix,
    veto,
)
from looseleaf_syntactic_domain.tagging import TagSet
from looseleaf_syntactic_domain.variants import PRESERVING, SETTINGS, QuestionSet, Variants
from looseleaf_text import EndpointModel, LanguageModel, LocalModel


@dataclass
class SyntacticDomainProbe(Probe):
    """Does a model answer because it understood, or because of the sentence's pattern of tags (arXiv 2509.21155)?

    Args:
        n: tags of a template in audits.
        top_n: most frequent templates that audits look at.
        tagset: tags as they come, universal ones, or coarse ones, which put question adverbs among the adverbs and all
            verbs together.
        settings: of each question: exact, synonym, antonym, disfluent, paraphrase; what the model goes by is named only
            where all five are there.
        high: an accuracy is high from chance + high * (in-domain exact accuracy - chance) on [ours].
        selection: fraction of the subjects whose answers choose a model's own templates; the gap is measured on the
            others.
        tries: draws of one question before it is dropped because its tags are wrong.
        tagger: built-in, for the built-in questions, or the name of an installed spaCy model.
        entities: subjects asked about, the first ones; None: all.
        choices: candidates of each question, the right answer among them; None: all answers of the domain.
        scoring: by likelihood of the candidates, by greedy generation, or by both; auto: both, of a model behind a
            server generation alone.
    """

    n: Annotated[int, In(">= 1")] = 5
    top_n: Annotated[int, In(">= 1")] = 100
    tagset: Annotated[TagSet, OneOf("fine", "universal", "coarse")] = "fine"
    settings: tuple[str, ...] = SETTINGS
    high: Annotated[float, In("(0, 1]")] = 0.5
    selection: Annotated[float, In("(0, 1)")] = 0.5
    tries: Annotated[int, In(">= 1")] = 20
    tagger: str = "built-in"
    entities: Annotated[int | None, In(">= 4")] = None
    choices: Annotated[int | None, In(">= 2")] = 10
    scoring: Annotated[Literal["auto", "likelihood", "generation", "both"],
                       OneOf("auto", "likelihood", "generation", "both")] = "auto"
    paper: ClassVar[Paper] = Paper(
        title="Learning the Wrong Lessons: Syntactic-Domain Spurious Correlations in Language Models",
        authors=("Chantal Shaib", "Vinith M. Suriyakumar", "Levent Sagun", "Byron C. Wallace", "Marzyeh Ghassemi"),
        year=2025, arxiv="2509.21155", venue="NeurIPS 2025",
        summary="Does a model answer because it understood, or because of the sentence's part-of-speech pattern?")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: few subjects and candidates."""
        return {"make": lambda: cls(entities=4, choices=3, scoring="likelihood"), "data": countries(4)}

    def validate(self) -> None:
        """See :meth:`looseleaf.Plugin.validate`."""
        known = not isinstance(self.settings, str) and all(s in SETTINGS for s in self.settings)
        self.check("settings", known and "exact" in self.settings, f"exact and some of {', '.join(SETTINGS)}")

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None,
            variants: Variants | None = None, state_dir: str | os.PathLike[str] | None = None) -> Report:
        """Ask for every fact in five settings, in its domain's templates and in those of others.

        Args:
            subject: a ``(model, tokenizer)`` pair, a text pipeline, a LocalModel or another LanguageModel; the model is
                any causal language model of transformers.
            data: :class:`DomainFacts`, or them as JSON text (``DomainFacts.to_json``); None: 24 countries.
            seed: of the words drawn, the candidates, the division of the subjects and the bootstrap.
            progress: show a progress bar; None: only on a terminal.
            variants: a tagger and word lists of your own, in the place of the fields tagset, tries and tagger.
            state_dir: folder of this run alone, in which a run that was stopped goes on.

        Raises:
            TypeError: another subject.
            ValueError: no tokenizer, data of another kind, or facts that cannot be used.
        """
        model = subject if isinstance(subject, LanguageModel) else LocalModel(*parts(subject, needs="tokenizer"))
        facts = self._facts(data)
        tools = variants or Variants(self.tagger, tagset=self.tagset, tries=self.tries)
        scoring = self.scoring
        if scoring == "auto":
            scoring = "generation" if isinstance(model, EndpointModel) else "both"
        built = tools.questions(facts, self.settings, seed=seed, progress=progress)
        asked = [*built.questions, *tools.controls(facts, seed)]
        with evaluating(model.model) if isinstance(model, LocalModel) else contextlib.nullcontext():
            answers = ask(model, asked, facts, choices=self.choices, scoring=scoring, seed=seed, state_dir=state_dir,
                          progress=progress)
        report = Report("Syntactic-domain probe", {
            "model": model.name, "questions": len(asked), "subjects": len(facts.subjects),
            "domains": ", ".join(f"{d} ({len(facts.templates[d])} templates, {len(set(facts.answers(d)))} answers)"
                                 for d in facts.domains),
            "tagger": tools.tagger.name, "tags": tools.tagger.tagset, "scored by": scoring, "candidates": self.choices,
            "high": self.high, "seed": seed})
        self._accuracies(report, answers, seed)
        self._domains(report, answers, facts, seed)
        self._controls(report, answers, seed)
        self._selected(report, answers, facts, seed)
        _built(report, built)
        own = [q for q in built.questions if q.reading == "own" and q.setting == "exact"]
        _associations(report, [q.text for q in own], [q.domain for q in own], self.n, self.top_n, tools)
        _examples(report, answers)
        return report

    def audit(self, texts: Texts, domains: Sequence[str], *, seed: int = 0, variants: Variants | None = None) -> Report:
        """Which templates of a labelled corpus, such as a fine-tuning set, give its domains away; no model needed.

        Args:
            texts: the texts, or lists of (word, tag) pairs. domains: of each.
            seed: of the controls.
            variants: a tagger of your own.

        Raises:
            ValueError: not as many domains as texts, or a single domain.
        """
        tools = variants or Variants(self.tagger, tagset=self.tagset, tries=self.tries)
        report = Report("Templates of a corpus", {
            "texts": len(texts), "domains": ", ".join(dict.fromkeys(map(str, domains))), "n": self.n,
            "top_n": self.top_n, "tagger": tools.tagger.name, "tags": tools.tagger.tagset, "seed": seed})
        _associations(report, texts, domains, self.n, self.top_n, tools, 40)
        told = cues(texts, domains, n=self.n, top_n=self.top_n, tagger=tools.tagger, tagset=tools.tagger.tagset,
                    seed=seed)
        report.table("What tells the domain", ["cue", "accuracy"], [[cue.name, cue.accuracy] for cue in told],
                     "each text guessed from the other half of the texts; templates give a domain away where they tell "
                     "more than the last word does; random labels must tell no more than frequency")
        return report

    def _facts(self, data: Any) -> DomainFacts:
        facts = countries() if data is None else DomainFacts.from_json(data) if isinstance(data, str) else data
        if not isinstance(facts, DomainFacts):
            raise ValueError(f"data: expected None, DomainFacts or them in JSON, got {type(data).__name__}")
        return facts if self.entities is None else facts.part(facts.subjects[:self.entities])

    # ------------------------------------------------------------------------------------------------------- tables
    def _accuracies(self, report: Report, answers: Answers, seed: int) -> None:
        columns = ["setting"]
        for name in ("in-domain", "cross-domain", "swapped wording"):
            columns += [name, f"{name} low", f"{name} high"]
        table = report.table("Accuracy by setting", [*columns, "greedy in-domain", "greedy cross-domain"], note=(
            "cross-domain: another domain's tags with this domain's words; swapped wording: the other domain's own "
            "words; 95 % bootstrap over subjects; greedy: the generated text begins with the right answer"))
        found: dict[str, list[tuple[int, Interval]]] = {"own": [], "matched": []}
        for number, setting in enumerate(self.settings):
            row: list[Cell] = [setting]
            for reading in ("own", "matched", "swapped"):
                interval = answers.interval(answers.where(setting=setting, reading=reading), seed=seed)
                row += [None] * 3 if interval is None else list(interval)
                if interval is not None and reading in found:
                    found[reading].append((number, interval))
            for reading in ("own", "matched"):
                which = answers.where(setting=setting, reading=reading)
                greedy = answers.interval(which, answers.generated, seed) if not np.isnan(answers.generated).any() \
                    else None
                row.append(None if greedy is None else greedy.value)
            table.add(*row)
        report.figure("Accuracy by setting", x_label=", ".join(f"{n} {s}" for n, s in enumerate(self.settings)),
                      y_label="accuracy", series=[
            Series(name, [n for n, _ in found[reading]], [i.value for _, i in found[reading]],
                   [i.low for _, i in found[reading]], [i.high for _, i in found[reading]], "points")
            for name, reading in (("in-domain templates", "own"), ("templates of other domains", "matched"))])

    def _domains(self, report: Report, answers: Answers, facts: DomainFacts, seed: int) -> None:
        table = report.table("What the model goes by", [
            "domain", "chance", "in-domain", "cross-domain", "gap", "gap low", "gap high", "answers of the template's "
            "domain", "risk", "risk by probability", "pattern of answers", "goes by"], note=(
            "in-domain and cross-domain: exact and synonym questions; risk: 0 to 2, 1 is ideal; goes by: the pattern "
            "of answers where no control explains it"))
        for name in (*facts.domains, "all"):
            shown = summarise(answers, self.settings, self.high, None if name == "all" else name, seed)
            gap = shown["gap"] or (None, None, None)
            table.add(name, shown["chance"], shown["in"], shown["cross"], *gap, shown["frame"], shown["risk"],
                      shown["risk by probability"], shown["pattern"], shown["goes by"])

    def _controls(self, report: Report, answers: Answers, seed: int) -> None:
        table = report.table("Controls", ["control", "accuracy", "low", "high", "exact less that", "low of that",
                                          "high of that"], note=(
            "frequency: the same question of another subject; last word: the subject and the last word alone; random "
            "labels: gap with each domain's templates labelled at random, and its 2.5 and 97.5 % quantiles"))
        exact = answers.where(reading="own", setting="exact")
        for reading in ("frequency", "last word"):
            which = answers.where(reading=reading)
            found, less = answers.interval(which, seed=seed), answers.difference(exact, which, seed=seed)
            if found is not None and less is not None:
                table.add(reading, *found, *less)
        shuffled = shuffled_gaps(answers, seed)
        if len(shuffled):
            table.add("random labels", float(shuffled.mean()), *map(float, np.quantile(shuffled, [0.025, 0.975])), None,
                      None, None)

    def _selected(self, report: Report, answers: Answers, facts: DomainFacts, seed: int) -> None:
        table = report.table("Templates chosen by the model's answers", [
            "domain", "templates", "chosen", "gap on the same answers", "gap", "low", "high"], note=(
            "chosen: more than half right; the gap on the same answers is above 0 for a model that guesses, so the "
            "other gap is that of subjects which chose nothing"))
        for domain in facts.domains:
            names, matrix = template_matrix(answers, domain)
            if min(matrix.shape) >= 2:
                found = select_templates(matrix, self.selection, seed)
                table.add(domain, len(names), int(found.chosen.sum()), found.circular, *(found.gap or (None,) * 3))


def summarise(answers: Answers, settings: Sequence[str] = SETTINGS, high: float = 0.5, domain: str | None = None,
              seed: int = 0) -> dict[str, Any]:
    """What a model's answers show, in one domain or in all.

    Returns:
        "accuracy" (setting -> accuracy in own templates), "in" and "cross" (accuracy of exact and synonym questions),
        "gap" with its interval, "chance", "frame" (fraction of exact matched questions answered for the domain whose
        template it is), "risk" and "risk by probability", "pattern" (see :func:`behaviour`) and "goes by" (the same
        unless a control explains it; see :func:`veto`). None where there is nothing to compute one from.
    """
    keep = np.ones(len(answers.questions), dtype=bool) if domain is None else answers.where(domain=domain)

    def mean(values: np.ndarray, **wanted: Any) -> float | None:
        which = keep & answers.where(**wanted)
        return float(np.mean(list(answers.by_subject(values, which).values()))) if which.any() else None

    every = {s: mean(answers.right, reading="own", setting=s) for s in settings}
    accuracy = {s: value for s, value in every.items() if value is not None}
    likely = {s: p for s in accuracy if (p := mean(answers.probability, reading="own", setting=s)) is not None}
    own, matched = (keep & answers.where(reading=r, setting=PRESERVING) for r in ("own", "matched"))
    cross = mean(answers.right, reading="matched", setting=PRESERVING)
    gap = answers.difference(own, matched, seed=seed)
    chance = float(answers.chance[own].mean()) if own.any() else 0.0
    whole = cross is not None and all(s in accuracy for s in SETTINGS)
    pattern = behaviour(accuracy, cross, chance, high) if whole and cross is not None else None
    goes_by = pattern
    if pattern is not None:
        part = Answers([q for q, k in zip(answers.questions, keep, strict=True) if k],
                       *(v[keep] for v in (answers.right, answers.probability, answers.generated, answers.frame,
                                           answers.chance)))
        exact = part.where(reading="own", setting="exact")
        less = [part.difference(exact, part.where(reading=r), seed=seed) for r in ("frequency", "last word")]
        goes_by = veto(pattern, less[0], less[1], gap.value if gap else None, shuffled_gaps(part, seed))
    risky = any(s in accuracy for s in ("antonym", "disfluent"))
    return {"accuracy": accuracy, "in": mean(answers.right, reading="own", setting=PRESERVING), "cross": cross,
            "gap": gap, "chance": chance, "frame": mean(answers.frame, reading="matched", setting="exact"),
            "risk": domain_risk(accuracy) if risky else None,
            "risk by probability": domain_risk(likely) if risky and np.isfinite([*likely.values()]).all() else None,
            "pattern": pattern, "goes by": goes_by}


def _built(report: Report, built: QuestionSet) -> None:
    reasons = {name: [f"{why}: {count}" for (setting, why), count in built.dropped.items() if setting == name]
               for name in SETTINGS}
    report.table("Questions", ["setting", "built", "redrawn", "dropped", "why"], [
        [name, sum(q.setting == name for q in built.questions), built.redrawn[name],
         sum(count for (setting, _), count in built.dropped.items() if setting == name), "; ".join(reasons[name])]
        for name in SETTINGS], f"{built.planned} planned; redrawn: the tagger gave other tags than were wanted")


def _associations(report: Report, texts: Texts, domains: Sequence[str], n: int, top_n: int, tools: Variants,
                  most: int = 12) -> None:
    found = spurious(texts, domains, n=n, top_n=top_n, tagger=tools.tagger, tagset=tools.tagger.tagset)
    report.facts |= {"templates tested": len({a.tags for a in found}),
                     "templates that give a domain away": len({a.tags for a in found if a.spurious})}
    report.table("Templates and domains", ["template", "domain", "texts of it", "texts of others", "lift", "bits", "G",
                                           "q"],
                 [[" ".join(a.tags), a.domain, a.inside, a.outside, a.lift, a.bits, a.g, a.q] for a in found[:most]],
                 "lift: P(template | domain) / P(template), bits: its log2; q: G-test after Benjamini and Hochberg "
                 f"over {len(found)} pairs; the first {min(most, len(found))}")


def _examples(report: Report, answers: Answers) -> None:
    shown: set[tuple[str, str]] = set()
    for question, right in zip(answers.questions, answers.right, strict=True):
        kind = (question.reading, question.setting)
        if kind not in shown:
            shown.add(kind)
            report.examples.append((f"{question.reading}, {question.setting}", f"{question.text}\n"
                                    f"right answer {question.answer}: {'given' if right > 0.5 else 'not given'}"))


__all__ = ["SyntacticDomainProbe", "summarise"]
