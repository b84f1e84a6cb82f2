"""Answers of a model to the questions, and what is computed of them: domain risk, gap, behaviour, selection."""

from __future__ import annotations

import functools
import itertools
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from looseleaf import progress as progress_
from looseleaf.resume import SearchState, digest
from looseleaf.statistics import Interval, bootstrap
from looseleaf_syntactic_domain.facts import DomainFacts
from looseleaf_syntactic_domain.variants import BREAKING, PRESERVING, SETTINGS, Question
from looseleaf_text import LanguageModel

BEHAVIOURS = ("correct", "entity memorisation", "prompt memorisation", "word-domain", "syntactic-domain", "none")
"""What a model may answer by."""
Scoring = Literal["likelihood", "generation", "both"]
PART = 256
"""Questions after which the state is written."""


@dataclass(frozen=True)
class Answers:
    """What a model answered; arrays over the questions, float64.

    Attributes:
        questions: the questions.
        right: whether the right answer is the likeliest of the candidates of its domain; of n equally likely ones it
            counts 1/n. By generation alone: as ``generated``.
        probability: of the right answer among those candidates; NaN by generation alone.
        generated: whether the generated text begins with the right answer; NaN by likelihood alone.
        frame: whether the answer is that of the domain whose template it is; NaN for the domain's own templates.
        chance: one over the number of candidates; 0 by generation alone.
    """

    questions: list[Question]
    right: np.ndarray
    probability: np.ndarray
    generated: np.ndarray
    frame: np.ndarray
    chance: np.ndarray

    @functools.cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        names = ("subject", "domain", "template", "setting", "reading")
        return {name: np.array([str(getattr(q, name)) for q in self.questions]) for name in names}

    def where(self, **wanted: Any) -> np.ndarray:
        """Which questions have these attributes: ``where(reading="own", setting="exact")``; a tuple names several."""
        found = np.ones(len(self.questions), dtype=bool)
        for name, value in wanted.items():
            values = value if isinstance(value, tuple) and name != "template" else (value,)
            found &= np.isin(self._columns[name], [str(v) for v in values])
        return found

    def by_subject(self, values: np.ndarray, which: np.ndarray) -> dict[str, float]:
        """The mean of ``values`` over the questions of each subject."""
        found: dict[str, list[float]] = {}
        for n in np.flatnonzero(which):
            found.setdefault(self.questions[n].subject, []).append(float(values[n]))
        return {subject: float(np.mean(own)) for subject, own in found.items()}

    def interval(self, which: np.ndarray, values: np.ndarray | None = None, seed: int = 0) -> Interval | None:
        """The mean with its 95 % interval, whole subjects resampled; None without questions."""
        means = self.by_subject(self.right if values is None else values, which)
        return bootstrap(means.values(), seed) if means else None

    def difference(self, one: np.ndarray, two: np.ndarray, values: np.ndarray | None = None,
                   seed: int = 0) -> Interval | None:
        """The mean over subjects of what ``one`` has more than ``two``, with its interval; None without subjects."""
        ours, theirs = (self.by_subject(self.right if values is None else values, w) for w in (one, two))
        both = [subject for subject in ours if subject in theirs]
        return bootstrap([ours[s] - theirs[s] for s in both], seed) if both else None


def ask(model: LanguageModel, questions: Sequence[Question], facts: DomainFacts, *, choices: int | None = 10,
        scoring: Scoring = "likelihood", seed: int = 0, state_dir: str | os.PathLike[str] | None = None,
        progress: bool | None = None) -> Answers:
    """Put every question to a model.

    Args:
        model: the model.
        questions: see :class:`Variants`.
        facts: what they ask for; its form and ending are used.
        choices: candidates of each subject and domain: the right answer and others of the domain, the same in every
            question about it; None: all of the domain.
        scoring: by the likelihood of the candidates, by greedy generation, or by both.
        seed: of the candidates.
        state_dir: folder of this run alone, in which a run that was stopped goes on.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: no question, or fewer than two choices.
    """
    if not questions:
        raise ValueError("questions: expected one or more, got none: see the report on why questions were dropped")
    if choices is not None and choices < 2:
        raise ValueError(f"choices: expected None or an integer >= 2, got {choices}")
    known, pools = facts.known, {d: list(dict.fromkeys(facts.answers(d))) for d in facts.domains}
    candidates: dict[tuple[str, str], list[str]] = {}
    for subject, domain, right in facts.facts:
        others = [a for a in pools[domain] if a != right]
        rng = random.Random(f"{seed}|candidates|{subject}|{domain}")
        count = len(others) if choices is None else min(choices - 1, len(others))
        candidates[subject, domain] = [right, *rng.sample(others, count)]
    longest = max(model.count_tokens(f" {fact.answer}{facts.ending}") for fact in facts.facts) + 2

    def answered(part: Sequence[Question]) -> list[list[float | None]]:
        prefixes = [facts.form.replace("{text}", q.text) for q in part]
        rows: list[list[float | None]] = [[None] * 4 for _ in part]
        own = [candidates[q.subject, q.domain] for q in part]
        framed = [known.get((q.subject, q.template[0])) if q.template[0] != q.domain else None for q in part]
        if scoring != "generation":
            listed = [[*answers, *([frame] if frame and frame not in answers else [])]
                      for answers, frame in zip(own, framed, strict=True)]
            scores = model.score(prefixes, [[f" {a}{facts.ending}" for a in answers] for answers in listed])
            for row, answers, every, values, frame in zip(rows, own, listed, scores, framed, strict=True):
                inside = np.array(values[:len(answers)])
                row[0] = 1 / int((inside == inside.max()).sum()) if values[0] == inside.max() else 0.0
                row[1] = float(np.exp(inside[0] - np.logaddexp.reduce(inside)))
                row[3] = None if frame is None else float(every[int(np.argmax(values))] == frame)
        if scoring != "likelihood":
            for row, text, q, frame in zip(rows, model.generate(prefixes, longest), part, framed, strict=True):
                row[2] = float(begins(text, q.answer))
                if scoring == "generation":
                    row[0], row[3] = row[2], None if frame is None else float(begins(text, frame))
        return rows

    state = SearchState(state_dir, {"questions": digest([list(map(str, q)) for q in questions]), "choices": choices,
                                    "facts": digest(facts.to_json()), "scoring": scoring, "seed": seed,
                                    "model": [model.name, model.fingerprint() if state_dir is not None else None]})
    rows: list[list[float | None]] = (state.load() or {}).get("rows", [])
    with progress_.bar("questions", len(questions), progress) as progress_bar:
        progress_bar.update(len(rows))
        while len(rows) < len(questions):
            rows += answered(questions[len(rows):len(rows) + PART])
            state.save({"rows": rows})
            progress_bar.update(min(len(rows), len(questions)) - progress_bar.n)
    columns = np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=np.float64).T
    chance = [0.0 if scoring == "generation" else 1 / len(candidates[q.subject, q.domain]) for q in questions]
    right, probability, generated, frame = columns
    return Answers(list(questions), right, probability, generated, frame, np.array(chance))


def begins(text: str, answer: str) -> bool:
    """Whether a generated text begins with an answer, whatever the case, and the answer's last word ends there."""
    given, wanted = text.strip().casefold(), answer.strip().casefold()
    return given.startswith(wanted) and not given[len(wanted):len(wanted) + 1].isalnum()


# ------------------------------------------------------------------------------------------------------- measures
def domain_risk(accuracy: Mapping[str, float]) -> float:
    """R(d): mean over the settings that keep the meaning, plus mean over those that break it, 0 to 2.

    2: always right, whatever was asked. 1: an ideal model, or one that only heeds the words.

    Args:
        accuracy: setting -> accuracy, or probability of the right answer; those of the two groups that were measured.

    Raises:
        ValueError: one of the groups is missing.
    """
    groups = [[accuracy[s] for s in group if s in accuracy] for group in (PRESERVING, BREAKING)]
    if not all(groups):
        raise ValueError("accuracy: expected exact or synonym, and antonym or disfluent, got "
                         f"{', '.join(accuracy) or 'none'}")
    return float(sum(np.mean(group) for group in groups))


def behaviour(accuracy: Mapping[str, float], cross: float, chance: float = 0.0, high: float = 0.5) -> str:
    """What a model answers by, one of :data:`BEHAVIOURS`.

    An accuracy is high at ``chance + high * (exact - chance)`` or above [the threshold is ours]. For the settings that
    break the meaning their mean counts, as in the domain risk.

    Args:
        accuracy: setting -> accuracy in the domain's own templates, all five settings.
        cross: accuracy in templates of other domains.
        chance: accuracy of guessing.
        high: see above, in (0, 1].

    Raises:
        ValueError: a setting is missing.
    """
    missing = [s for s in SETTINGS if s not in accuracy]
    if missing:
        raise ValueError(f"accuracy: expected {', '.join(SETTINGS)}, got none for {', '.join(missing)}")
    if accuracy["exact"] <= chance:
        return "none"
    limit = chance + high * (accuracy["exact"] - chance) - 1e-12
    synonym, paraphrase = accuracy["synonym"] >= limit, accuracy["paraphrase"] >= limit
    broken, crossed = float(np.mean([accuracy[s] for s in BREAKING])) >= limit, cross >= limit
    alone = max(*(accuracy[s] for s in SETTINGS if s != "exact"), cross) < limit
    kinds = {"prompt memorisation": alone, "entity memorisation": synonym and paraphrase and broken and crossed,
             "correct": synonym and paraphrase and not broken and crossed,
             "word-domain": synonym and not broken and not crossed,
             "syntactic-domain": synonym and broken and not crossed}
    return next((kind for kind, holds in kinds.items() if holds), "none")


class Selection(NamedTuple):
    """In-domain and cross-domain templates as a model's own answers choose them.

    Attributes:
        chosen: (templates,) bool: more than half of the selection's items are right.
        circular: gap on the very items that chose; above 0 for a model that guesses.
        gap: gap on the other subjects, with its interval; None where all templates or none were chosen.
    """

    chosen: np.ndarray
    circular: float | None
    gap: Interval | None


def select_templates(right: np.ndarray, fraction: float = 0.5, seed: int = 0) -> Selection:
    """Find a model's in-domain templates by its answers about some subjects, and measure the gap on the others.

    Args:
        right: (templates, subjects), whether an answer is right; NaN where there is no question.
        fraction: of the subjects, for the selection, in (0, 1).
        seed: of the division of the subjects.

    Raises:
        ValueError: fewer than two templates or subjects, or a fraction that leaves a side empty.
    """
    if right.ndim != 2 or min(right.shape) < 2:
        raise ValueError(f"right: expected (templates, subjects), two or more of each, got {right.shape}")
    order = np.random.default_rng(seed).permutation(right.shape[1])
    count = round(fraction * right.shape[1])
    if not 0 < count < right.shape[1]:
        raise ValueError(f"fraction: expected one that leaves subjects on both sides, got {fraction} of "
                         f"{right.shape[1]} subjects")
    chosen = _mean(right[:, order[:count]], 1) > 0.5
    if chosen.all() or not chosen.any():
        return Selection(chosen, None, None)
    circular = _mean(right[chosen][:, order[:count]]) - _mean(right[~chosen][:, order[:count]])
    rest = right[:, order[count:]]
    gaps = _mean(rest[chosen], 0) - _mean(rest[~chosen], 0)
    gaps = gaps[np.isfinite(gaps)]
    return Selection(chosen, float(circular), bootstrap(gaps, seed) if len(gaps) else None)


def _mean(values: np.ndarray, axis: int | None = None) -> Any:
    """The mean of what is not NaN; NaN where nothing is."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, values, 0).sum(axis) / known.sum(axis)


def shuffled_gaps(answers: Answers, seed: int = 0, shuffles: int = 400) -> np.ndarray:
    """The gap between in-domain and cross-domain accuracy with each domain's templates labelled at random.

    All ways of labelling are equally likely where a template's domain makes no difference; they are drawn by whole
    templates, since the questions of one stand or fall together. Of one domain all ways are gone through, where they
    are no more than ``shuffles``.

    Returns:
        One gap for each way, float64; empty without questions of both readings.
    """
    keep = answers.where(setting=PRESERVING)
    tables: list[tuple[np.ndarray, int]] = []
    for domain in dict.fromkeys(q.domain for q in answers.questions):
        sides: list[list[float]] = []
        for reading in ("own", "matched"):
            found: dict[tuple[str, int], list[float]] = {}
            for n in np.flatnonzero(keep & answers.where(domain=domain, reading=reading)):
                found.setdefault(answers.questions[n].template, []).append(float(answers.right[n]))
            sides.append([float(np.mean(values)) for values in found.values()])
        if all(sides):
            tables.append((np.array([*sides[0], *sides[1]]), len(sides[0])))

    def gap(values: np.ndarray, chosen: Any) -> float:
        inside = np.isin(np.arange(len(values)), chosen)
        return float(values[inside].mean() - values[~inside].mean())

    if len(tables) == 1 and math.comb(len(tables[0][0]), tables[0][1]) <= shuffles:
        values, count = tables[0]
        return np.array([gap(values, chosen) for chosen in itertools.combinations(range(len(values)), count)])
    rng = np.random.default_rng(seed)
    return np.array([np.mean([gap(values, rng.permutation(len(values))[:count]) for values, count in tables])
                     for _ in range(shuffles if tables else 0)])


def template_matrix(answers: Answers, domain: str) -> tuple[list[tuple[str, int]], np.ndarray]:
    """Templates of a domain's exact questions, own and matched, and (templates, subjects) whether they were right."""
    which = answers.where(domain=domain, setting="exact", reading=("own", "matched"))
    chosen = [n for n in np.flatnonzero(which)]
    templates = list(dict.fromkeys(answers.questions[n].template for n in chosen))
    subjects = list(dict.fromkeys(answers.questions[n].subject for n in chosen))
    table = np.full((len(templates), len(subjects)), np.nan)
    for n in chosen:
        question = answers.questions[n]
        table[templates.index(question.template), subjects.index(question.subject)] = answers.right[n]
    return templates, table


def veto(found: str, exact_over_frequency: Interval | None, exact_over_last_word: Interval | None,
         gap: float | None, shuffled: np.ndarray) -> str:
    """The behaviour that is left when the controls have been heard: "none (why)" where one explains it.

    Args:
        found: by :func:`behaviour`.
        exact_over_frequency: accuracy of exact questions less that of the same asked of another subject; it must be
            above 0 for every behaviour.
        exact_over_last_word: less that of the subject and the last word alone; it must be above 0 for those that are
            about the pattern of the sentence.
        gap: in-domain less cross-domain accuracy.
        shuffled: the same with shuffled labels; no more than 5 % of them may reach the gap for those behaviours. So it
            takes three templates of a domain and three of others to show one there.
    """
    if found == "none":
        return found
    if exact_over_frequency is not None and exact_over_frequency.low <= 0:
        return "none (frequency)"
    if found in ("prompt memorisation", "word-domain", "syntactic-domain"):
        if exact_over_last_word is not None and exact_over_last_word.low <= 0:
            return "none (last word)"
        if gap is not None and len(shuffled) and float((shuffled >= gap - 1e-9).mean()) > 0.05:
            return "none (random labels)"
    return found


def expected_gap(items: int) -> float:
    """The gap that a model which guesses right half of the time shows where its own answers choose the templates.

    Exact, over ``items`` answers for each template: 1.0, 0.375 and 0.18 for 1, 5 and 20.
    """
    counts = np.arange(items + 1)
    ways = np.array([float(np.prod([(items - j) / (j + 1) for j in range(k)])) for k in counts])
    odds = ways / ways.sum()
    above = counts > items / 2
    means = [float((counts * odds)[side].sum() / odds[side].sum()) / items for side in (above, ~above)]
    return means[0] - means[1]


__all__ = ["BEHAVIOURS", "Answers", "Scoring", "Selection", "ask", "begins", "behaviour", "domain_risk", "expected_gap",
           "select_templates", "shuffled_gaps", "template_matrix", "veto"]
