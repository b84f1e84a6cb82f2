"""Risk, behaviours, selection, controls and audits, on cases whose answer is known."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2, chi2_contingency, false_discovery_control

from looseleaf_syntactic_domain import (
    DomainFacts,
    Fact,
    PlantedModel,
    SyntacticDomainProbe,
    Variants,
    ask,
    behaviour,
    countries,
    cues,
    domain_risk,
    select_templates,
    spurious,
    summarise,
    template_rate,
    templates,
    templates_per_token,
)
from looseleaf_syntactic_domain.audit import adjusted, g_statistic
from looseleaf_syntactic_domain.scores import Answers, begins, expected_gap, shuffled_gaps, veto
from looseleaf_text import LanguageModel

SETTINGS = ("exact", "synonym", "antonym", "disfluent", "paraphrase")


def answered(model: LanguageModel, facts: DomainFacts, **options: Any) -> Answers:
    tools = Variants()
    return ask(model, [*tools.questions(facts, progress=False).questions, *tools.controls(facts)], facts,
               progress=False, **options)


# ------------------------------------------------------------------------------------------------------------ measures
def test_risk() -> None:
    assert domain_risk(dict.fromkeys(SETTINGS, 1.0)) == 2
    assert domain_risk({"exact": 1, "synonym": 1, "antonym": 0, "disfluent": 0, "paraphrase": 1}) == 1
    assert domain_risk({"exact": 0.9, "synonym": 0.7, "antonym": 0.4}) == pytest.approx(1.2)
    with pytest.raises(ValueError, match=r"expected exact or synonym, and antonym or disfluent, got exact"):
        domain_risk({"exact": 1})


@pytest.mark.parametrize(("row", "cross", "kind"), [
    ((1, 1, 0, 0, 1), 1, "correct"), ((1, 1, 1, 1, 1), 1, "entity memorisation"),
    ((1, 0, 0, 0, 0), 0, "prompt memorisation"), ((1, 1, 0, 0, 0), 0, "word-domain"),
    ((1, 1, 0, 0, 1), 0, "word-domain"), ((1, 1, 1, 1, 0), 0, "syntactic-domain"),
    ((1, 1, 1, 1, 1), 0, "syntactic-domain"), ((1, 1, 1, 0.2, 0), 0, "syntactic-domain"),
    ((0.1, 0.1, 0.1, 0.1, 0.1), 0.1, "none"), ((1, 0, 1, 1, 1), 1, "none"), ((1, 1, 1, 1, 0), 1, "none"),
    ((0.93, 0.91, 0.90, 0.24, 0.53), 0.42, "syntactic-domain"),  # the 1B model of the card's table
    ((0.55, 0.54, 0.12, 0.10, 0.5), 0.5, "correct"),
])
def test_behaviours(row: tuple[float, ...], cross: float, kind: str) -> None:
    accuracy = dict(zip(SETTINGS, row, strict=True))
    assert behaviour(accuracy, cross, chance=0.1) == kind


def test_behaviour_and_threshold() -> None:
    accuracy = dict(zip(SETTINGS, (1.0, 0.6, 0.0, 0.0, 0.0), strict=True))
    assert behaviour(accuracy, 0.0, 0.0) == "word-domain"
    assert behaviour(accuracy, 0.0, 0.0, high=0.7) == "prompt memorisation"
    with pytest.raises(ValueError, match=r"got none for paraphrase"):
        behaviour({s: 1.0 for s in SETTINGS[:4]}, 0.0)


def test_coin_flips_show_a_gap_only_where_they_choose() -> None:
    assert [expected_gap(n) for n in (1, 5, 20)] == pytest.approx([1.0, 0.375, 0.1818], abs=1e-3)
    rng = np.random.default_rng(0)
    circular: dict[int, list[float]] = {1: [], 5: [], 20: []}
    honest, covered = [], []
    for seed in range(100):
        for items in circular:
            right = (rng.random((40, 2 * items)) < 0.5).astype(float)
            found = select_templates(right, 0.5, seed)
            assert found.circular is not None and found.gap is not None
            circular[items].append(found.circular)
            if items == 20:
                honest.append(found.gap.value)
                covered.append(found.gap.low <= 0 <= found.gap.high)
    means = [float(np.mean(values)) for values in circular.values()]
    assert means == pytest.approx([1.0, 0.375, 0.18], abs=0.02)
    assert abs(float(np.mean(honest))) < 0.01 and float(np.mean(covered)) > 0.85


def test_selection_finds_what_is_there() -> None:
    right = np.zeros((6, 10))
    right[:2] = 1
    found = select_templates(right)
    assert found.chosen.tolist() == [True, True, False, False, False, False] and found.circular == 1
    assert found.gap is not None and found.gap == (1, 1, 1)
    assert select_templates(np.ones((3, 4))).gap is None
    right[0, 3] = np.nan
    assert select_templates(right).gap == (1, 1, 1)
    for bad, words in ((np.ones(3), r"\(templates, subjects\)"), (np.ones((1, 9)), r"got \(1, 9\)")):
        with pytest.raises(ValueError, match=words):
            select_templates(bad)
    with pytest.raises(ValueError, match=r"leaves subjects on both sides, got 0.01"):
        select_templates(np.ones((3, 9)), 0.01)


def test_begins() -> None:
    assert begins(" tokyo.", "Tokyo") and begins("Tokyo", "Tokyo") and not begins(" Tokyos", "Tokyo")
    assert not begins("It is Tokyo", "Tokyo")


# ------------------------------------------------------------------------------------------------------ planted models
@pytest.mark.parametrize("rule", ["correct", "entity memorisation", "prompt memorisation", "word-domain",
                                  "syntactic-domain"])
def test_planted_behaviours_are_found(rule: str) -> None:
    facts = countries(10)
    answers = answered(PlantedModel(facts, rule), facts, scoring="both")
    for domain in (None, *facts.domains):
        found = summarise(answers, domain=domain)
        assert found["pattern"] == found["goes by"] == rule, domain
    found = summarise(answers)
    assert found["in"] > 0.5 and found["chance"] == pytest.approx(0.1)
    risk = {"correct": 1, "word-domain": 1, "entity memorisation": 2, "syntactic-domain": 2}.get(rule)
    assert risk is None or found["risk"] == pytest.approx(risk, abs=0.25)
    if rule == "syntactic-domain":
        assert found["frame"] == 1 and found["cross"] < 0.2 and found["gap"].low > 0.7
        exact = answers.where(setting="exact", reading="own")
        assert answers.generated[exact].all() and answers.right[exact].all()
    if rule == "correct":
        assert found["frame"] == 0 and found["gap"] == (0, 0, 0)


def test_a_model_that_guesses_shows_nothing() -> None:
    facts, gaps = countries(12), []
    for seed in range(4):
        found = summarise(answered(PlantedModel(facts, "guesses", seed=seed), facts), seed=seed)
        assert found["goes by"].startswith("none")
        gaps.append((found["gap"].value, found["gap"].low <= 0 <= found["gap"].high))
    assert abs(np.mean([g for g, _ in gaps])) < 0.02 and sum(c for _, c in gaps) >= 3


def test_frequent_answers_alone_are_caught() -> None:
    facts = countries(20)
    common = {"capital": "Rome", "currency": "euro", "language": "French"}
    facts = dataclasses.replace(facts, facts=tuple(
        Fact(f.subject, f.domain, common[f.domain] if n % 60 < 48 else f.answer) for n, f in enumerate(facts.facts)))
    found = summarise(answered(PlantedModel(facts, "frequency"), facts, choices=4))
    assert found["accuracy"]["exact"] == pytest.approx(0.8)
    assert found["pattern"] == "entity memorisation" and found["goes by"] == "none (frequency)"


def test_the_last_word_alone_is_caught() -> None:
    facts = countries(10)
    endings = dict(zip(facts.domains, ("me", "us", "them"), strict=True))
    beginnings = ("Tell the {relation} of {subject}", "Please name the main {relation} of {subject}",
                  "I want to learn the usual {relation} of {subject}")
    kinds = zip(endings.items(), beginnings, strict=True)
    facts = dataclasses.replace(facts, templates={d: (f"{first} for {end}.",) for (d, end), first in kinds})
    found = summarise(answered(PlantedModel(facts, "last word"), facts))
    assert found["pattern"] == "syntactic-domain" and found["goes by"] == "none (last word)"
    syntax = summarise(answered(PlantedModel(facts, "syntactic-domain"), facts))
    assert syntax["goes by"] == "none (random labels)", "one template of each domain cannot show a pattern"


def test_labels_at_random_are_caught() -> None:
    """Templates answered rightly by luck of the draw: a gap now and then, and no more often than shuffled labels."""
    facts = countries(6)
    built = Variants().questions(facts, progress=False).questions
    luck, named, gaps = [], [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        lucky = {t: float(rng.random() < 0.5) for t in {(q.domain, q.template) for q in built}}
        right = np.array([lucky[q.domain, q.template] for q in built])
        nothing = np.full(len(built), np.nan)
        answers = Answers(built, right, nothing, nothing, nothing, np.full(len(built), 0.1))
        gap = answers.difference(answers.where(reading="own"), answers.where(reading="matched"))
        assert gap is not None
        gaps.append(gap.value)
        luck.append(gap.low > 0)
        shuffled = shuffled_gaps(answers, seed, 100)
        assert abs(shuffled.mean()) < 0.1
        named.append(veto("syntactic-domain", None, None, gap.value, shuffled) == "syntactic-domain")
    # the bootstrap over subjects knows nothing of the draw of templates; the shuffle does
    assert abs(np.mean(gaps)) < 0.15 and np.mean(luck) > 0.2 and np.mean(named) <= 0.1


def test_veto() -> None:
    from looseleaf.statistics import Interval

    above, below, none = Interval(0.5, 0.4, 0.6), Interval(0.0, -0.1, 0.1), np.array([])
    assert veto("none", below, below, 0.0, none) == "none"
    assert veto("correct", below, above, None, none) == "none (frequency)"
    assert veto("correct", above, below, 0.0, none) == "correct"
    assert veto("word-domain", above, below, 0.5, none) == "none (last word)"
    assert veto("word-domain", above, above, 0.5, np.linspace(-1, 1, 50)) == "none (random labels)"
    assert veto("word-domain", above, above, 1.5, np.linspace(-1, 1, 50)) == "word-domain"


# -------------------------------------------------------------------------------------------------------------- asking
def test_ties_count_as_guesses_and_candidates_are_the_same_throughout() -> None:
    class Constant(PlantedModel):
        def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
            seen.extend(tuple(row[:5]) for row in continuations)
            return [[-1.0] * len(row) for row in continuations]

    facts, seen = countries(6), []  # type: ignore[var-annotated]
    answers = answered(Constant(facts, "guesses"), facts, choices=5)
    assert np.allclose(answers.right, 0.2) and np.allclose(answers.probability, 0.2) and (answers.chance == 0.2).all()
    assert np.isnan(answers.generated).all()
    by_fact: dict[Any, set[Any]] = {}
    for question, row in zip(answers.questions, seen, strict=True):
        by_fact.setdefault((question.subject, question.domain), set()).add(row)
    assert all(len(rows) == 1 for rows in by_fact.values()) and len(by_fact) == 18


def test_generation_alone() -> None:
    facts = countries(4)
    answers = answered(PlantedModel(facts, "syntactic-domain"), facts, scoring="generation")
    assert np.isnan(answers.probability).all() and (answers.chance == 0).all()
    found = summarise(answers)
    assert found["pattern"] == "syntactic-domain" and found["frame"] == 1 and found["risk by probability"] is None
    with pytest.raises(ValueError, match=r"expected one or more, got none"):
        ask(PlantedModel(facts, "guesses"), [], facts)
    with pytest.raises(ValueError, match=r"choices: expected None or an integer >= 2, got 1"):
        answered(PlantedModel(facts, "guesses"), facts, choices=1)
    with pytest.raises(ValueError, match=r"rule: expected one of correct"):
        PlantedModel(facts, "wrong")


def test_a_stopped_run_goes_on(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("looseleaf_syntactic_domain.scores.PART", 20)
    facts = countries(3)
    whole = answered(PlantedModel(facts, "correct"), facts)

    class Stops(PlantedModel):
        def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
            if self.calls >= 60:
                raise KeyboardInterrupt
            return super().score(prefixes, continuations)

    with pytest.raises(KeyboardInterrupt):
        answered(Stops(facts, "correct"), facts, state_dir=tmp_path)
    model = PlantedModel(facts, "correct")
    again = answered(model, facts, state_dir=tmp_path)
    assert model.calls == len(whole.questions) - 60 and (again.right == whole.right).all()


# --------------------------------------------------------------------------------------------------------------- audit
def planted_corpus(counts: tuple[int, ...] = (90, 5, 5), size: int = 100) -> tuple[list[Any], list[str]]:
    """Texts of three domains; so many of each have the tags "A B C"."""
    texts: list[Any] = []
    for count in counts:
        texts += [[(w, t) for w, t in zip("abc", "ABC" if i < count else "CBA", strict=True)] for i in range(size)]
    return texts, [name for name in ("x", "y", "z")[:len(counts)] for _ in range(size)]


def test_lift_and_bits() -> None:
    texts, domains = planted_corpus()
    found = {(a.tags, a.domain): a for a in spurious(texts, domains, n=3)}
    hit = found[("A", "B", "C"), "x"]
    assert hit.lift == pytest.approx(2.7, abs=1e-12) and hit.bits == pytest.approx(1.433, abs=5e-4)
    assert (hit.inside, hit.outside) == (90, 10) and hit.spurious and not found[("A", "B", "C"), "y"].spurious
    table = np.array([[90, 10], [10, 190]])
    reference = chi2_contingency(table, correction=False, lambda_="log-likelihood")
    assert hit.g == pytest.approx(reference.statistic) and hit.p == pytest.approx(chi2.sf(hit.g, 1))
    assert spurious(texts, domains, n=3)[0].spurious


def test_adjusted_and_g_against_scipy() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(30) ** 2
    np.testing.assert_allclose(adjusted(p), false_discovery_control(p))
    assert adjusted([]) == []
    for _ in range(5):
        table = rng.integers(1, 30, (2, 2))
        assert g_statistic(table.astype(float)) == pytest.approx(
            chi2_contingency(table, correction=False, lambda_="log-likelihood").statistic)
    assert g_statistic(np.array([[0.0, 4.0], [4.0, 0.0]])) == pytest.approx(2 * 8 * math.log(2))


def test_templates_are_counted_in_texts_and_matched_as_tags() -> None:
    texts = ["Japan has kettles", "Japan has kettles and kettles and kettles", "Please sit"]
    found = templates(texts, n=2, top_n=2)
    assert [(t.tags, t.occurrences, t.texts) for t in found] == [(("CC", "NNS"), 2, 1), (("NNP", "VBZ"), 2, 2)]
    assert template_rate(texts, found) == pytest.approx(2 / 3)
    assert templates_per_token(texts, found) == pytest.approx([1 / 3, 3 / 7, 0])
    # the toolkit looks for "NN VB" as a part of "NN VBZ": tags are not matched by their beginnings here
    assert template_rate([[("a", "NN"), ("b", "VBZ")]], templates([[("a", "NN"), ("b", "VB")]], n=2)) == 0
    assert templates(["Japan sits"], n=None)[0].tags == ("NNP", "VBZ") and templates(["Japan"], n=2) == []
    with pytest.raises(ValueError, match=r"n=0"):
        templates(texts, n=0)
    with pytest.raises(ValueError, match=r"expected one or more, got none"):
        template_rate([], found)


def test_shuffled_labels_give_no_more_finds_than_q() -> None:
    rng = np.random.default_rng(0)
    texts = [[("w", t) for t in rng.choice(list("ABC"), 8)] for _ in range(300)]
    domains = ["x", "y", "z"] * 100
    false = [any(a.spurious for a in spurious(texts, list(rng.permutation(domains)), n=2)) for _ in range(60)]
    assert np.mean(false) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 60)
    planted = [text if d != "x" or rng.random() < 0.5 else [("w", "D"), ("w", "E"), *text]
               for text, d in zip(texts, domains, strict=True)]
    hits = [a for a in spurious(planted, domains, n=2) if a.spurious]
    assert hits[0].tags == ("D", "E") and hits[0].domain == "x" and hits[0].q < 0.05


def test_cues() -> None:
    texts, domains = planted_corpus((100, 0), 60)
    told = {cue.name: cue.accuracy for cue in cues(texts[:50] + texts[60:], domains[:50] + domains[60:], n=3)}
    assert told["templates"] == 1 and told["frequency"] == pytest.approx(60 / 110)
    assert told["last word"] < 0.6 and told["random labels"] < 0.75
    # the last word gives it away, and all tags are alike
    last = [[("a", "A"), (d, "B")] for d in domains]
    told = {cue.name: cue.accuracy for cue in cues(last, domains, n=2)}
    assert told["last word"] == 1 and told["templates"] < 0.6
    report = SyntacticDomainProbe(n=3).audit(texts, domains)
    assert report.facts["templates that give a domain away"] == 2 and len(report.tables) == 2
    for call in (spurious, cues):
        with pytest.raises(ValueError, match=r"domains: expected"):
            call(texts, ["x"])  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"domains: expected two or more, got x"):
        spurious(texts, ["x"] * len(texts))
