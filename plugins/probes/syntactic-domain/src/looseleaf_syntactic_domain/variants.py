"""The five settings of each question, in the domain's own templates and in those of others."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from looseleaf import progress as progress_
from looseleaf_syntactic_domain.facts import DomainFacts, fill
from looseleaf_syntactic_domain.tagging import WORDS, TagSet, TextTagger

SETTINGS = ("exact", "synonym", "antonym", "disfluent", "paraphrase")
"""As it is; meaning and tags kept; meaning broken, tags kept; random words of the same tags; meaning kept, tags not."""
PRESERVING, BREAKING = ("exact", "synonym"), ("antonym", "disfluent")
"""Settings that keep the meaning under the same tags (SP), and those that do not (SB)."""
Reading = Literal["own", "matched", "swapped", "frequency", "last word"]
_WRAPPERS = ("Somebody asked me this: {text}", "{text} That is what they asked me.")


class Question(NamedTuple):
    """One question in one setting.

    Attributes:
        text: the question.
        subject, domain, answer: what is asked for, and the right answer.
        template: the domain whose template it is, and its number there.
        setting: one of :data:`SETTINGS`.
        reading: "own": in a template of the domain. "matched": in the tags of a template of another domain, with this
            domain's words. "swapped": in the other's wording. "frequency", "last word": the controls.
    """

    text: str
    subject: str
    domain: str
    answer: str
    template: tuple[str, int]
    setting: str
    reading: Reading


@dataclass
class QuestionSet:
    """Questions and what became of the others.

    Attributes:
        questions: those that passed the check of their tags.
        planned: how many were to be built.
        redrawn: setting -> how many draws failed the check.
        dropped: (setting, why) -> how many could not be built.
    """

    questions: list[Question] = field(default_factory=list)
    planned: int = 0
    redrawn: Counter[str] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)


class _Cannot(Exception):
    """Why a question cannot be built."""


class _Piece(NamedTuple):
    """A word of a question: its place in the text, its tag, and whether it belongs to the subject or the relation."""

    start: int
    end: int
    word: str
    tag: str
    subject: bool
    relation: bool


class Variants:
    """Builds questions and checks their tags.

    Args:
        tagger: see :class:`TextTagger`; every question is tagged again by it.
        synonyms, antonyms: word -> words of the same tag; they are added to those of the facts. See
            :func:`wordnet_words`.
        words: fine tag -> words that disfluent questions are made of, in the place of the built-in ones.
        tagset: see :class:`TextTagger`.
        tries: draws of one question before it is dropped.
    """

    def __init__(self, tagger: Any = "built-in", synonyms: Mapping[str, Sequence[str]] | None = None,
                 antonyms: Mapping[str, Sequence[str]] | None = None,
                 words: Mapping[str, Iterable[str]] | None = None, *, tagset: TagSet = "fine", tries: int = 20) -> None:
        if tries < 1:
            raise ValueError(f"tries: expected an integer >= 1, got {tries}")
        self.tagger = TextTagger(tagger, tagset)
        self.synonyms, self.antonyms, self.tries = dict(synonyms or {}), dict(antonyms or {}), tries
        self.words: dict[str, list[str]] = {}
        for tag, known in (WORDS if words is None else words).items():
            for word in known:
                self.words.setdefault(self.tagger.mapped(word, tag), []).append(word)

    def questions(self, facts: DomainFacts, settings: Sequence[str] = SETTINGS, *, cross: int | None = None,
                  swapped: bool = True, seed: int = 0, progress: bool | None = None) -> QuestionSet:
        """All settings of every fact in every template of its domain, and in templates of other domains.

        Args:
            facts: what is asked for.
            settings: some of :data:`SETTINGS`; those of templates of other domains as well.
            cross: how many templates of other domains for each domain, drawn by seed; None: as many as its own.
            swapped: exact questions in the others' wording, too.
            seed: of every draw. A question's own draw depends on nothing but the seed and what it is.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            ValueError: an unknown setting.
        """
        unknown = [name for name in settings if name not in SETTINGS]
        if unknown or not settings:
            raise ValueError(f"settings: expected some of {', '.join(SETTINGS)}, got {list(settings)}")
        out = QuestionSet()
        known = facts.known
        taken = {w.lower() for texts in (*facts.templates.values(), facts.relations.values()) for t in texts
                 for w in t.split()} | {w for v in self._listed(facts, "synonyms").values() for w in v}
        plan: list[tuple[str, tuple[str, int], Reading]] = []
        patterns = {(d, number): self.tagger.tags(fill(text, facts.subjects[0], facts.relations.get(d, "")))
                    for d in facts.domains for number, text in enumerate(facts.templates[d])}
        for domain in facts.domains:
            own = [template for template in patterns if template[0] == domain]
            # a template that the domain has as well is no other domain's
            others = [t for t in patterns if t[0] != domain and patterns[t] not in {patterns[o] for o in own}]
            count = min(len(others), len(own) if cross is None else cross)
            drawn = sorted(random.Random(f"{seed} {domain}").sample(others, count))
            plan += [(domain, template, "own") for template in own]
            plan += [(domain, template, "matched") for template in drawn]
            plan += [(domain, template, "swapped") for template in drawn if swapped]
        for domain, template, reading in progress_.track(plan, "questions", show=progress):
            for subject in facts.subjects:
                if (subject, domain) not in known:
                    continue
                for setting in settings if reading != "swapped" else ("exact",):
                    out.planned += 1
                    rng = random.Random(f"{seed}|{setting}|{reading}|{domain}|{template}|{subject}")
                    try:
                        text = self._text(facts, setting, reading, domain, template, subject, taken, rng, out)
                    except _Cannot as reason:
                        out.dropped[setting, str(reason)] += 1
                        continue
                    out.questions.append(Question(text, subject, domain, known[subject, domain], template, setting,
                                                  reading))
        return out

    def controls(self, facts: DomainFacts, seed: int = 0) -> list[Question]:
        """Questions that give no accuracy to a model that reads them: see the probe's table of controls.

        "frequency": each exact question asked of another subject, the right answer being that of the first. "last
        word": the subject and the last word of the question, without the rest.
        """
        out: list[Question] = []
        known = facts.known
        for domain in facts.domains:
            subjects = [s for s in facts.subjects if (s, domain) in known]
            for number, template in enumerate(facts.templates[domain]):
                for subject in subjects:
                    rng = random.Random(f"{seed}|control|{domain}|{number}|{subject}")
                    other = rng.choice([s for s in subjects if s != subject])
                    relation, answer = facts.relations.get(domain, ""), known[subject, domain]
                    text = fill(template, subject, relation)
                    pieces = self._pieces(text, template, subject, relation)
                    last = next((p for p in reversed(pieces) if any(map(str.isalnum, p.word))), None)
                    tail = text[last.start:] if last and not last.subject else ""
                    short = f"{subject} {tail}" if tail else subject + (text[last.end:] if last else "")
                    key = (domain, number)
                    out.append(Question(fill(template, other, relation), subject, domain, answer, key, "exact",
                                        "frequency"))
                    out.append(Question(short, subject, domain, answer, key, "exact", "last word"))
        return out

    # ------------------------------------------------------------------------------------------------- one question
    def base(self, facts: DomainFacts, reading: Reading, domain: str, template: tuple[str, int], subject: str,
             rng: random.Random) -> tuple[str, str, str]:
        """The exact question of a reading: its text, the template it comes from, and what stands for the relation.

        Raises:
            ValueError: the domain has no word of a tag that the other domain's template needs.
        """
        try:
            return self._base(facts, reading, domain, template, subject, rng)
        except _Cannot as error:
            raise ValueError(f"expected {{relation}} in {facts.templates[template[0]][template[1]]!r}, or words of "
                             f"{domain!r} for all its tags, got {error}") from error

    def _base(self, facts: DomainFacts, reading: Reading, domain: str, template: tuple[str, int], subject: str,
              rng: random.Random) -> tuple[str, str, str]:
        wording = facts.templates[template[0]][template[1]]
        relation = facts.relations.get(template[0] if reading == "swapped" else domain, "")
        text = fill(wording, subject, relation)
        if reading != "matched" or "{relation}" in wording:
            return text, wording, relation
        own: dict[str, list[str]] = {}  # the content words of this domain by tag
        for each in facts.templates[domain]:
            own_text = fill(each, subject, relation)
            for piece in self._pieces(own_text, each, subject, relation):
                if not piece.subject and self.tagger.content(piece.word, piece.tag):
                    own.setdefault(piece.tag, []).append(piece.word)
        pieces = self._pieces(text, wording, subject, relation)
        new: dict[_Piece, str] = {}
        for piece in pieces:
            if not piece.subject and self.tagger.content(piece.word, piece.tag):
                if piece.tag not in own:
                    raise _Cannot(f"no word of the domain with the tag {piece.tag}")
                new[piece] = rng.choice(own[piece.tag])
        return _replaced(text, new), wording, relation

    def _text(self, facts: DomainFacts, setting: str, reading: Reading, domain: str, template: tuple[str, int],
              subject: str, taken: set[str], rng: random.Random, out: QuestionSet) -> str:
        text, wording, relation = self._base(facts, reading, domain, template, subject, rng)
        tags = self.tagger.tags(text)
        if reading == "matched" and tags != self.tagger.tags(fill(wording, subject,
                                                                  facts.relations.get(template[0], ""))):
            raise _Cannot("the other domain's template has other tags with this domain's words")
        if setting == "exact":
            return text
        if setting == "paraphrase":
            every = {self.tagger.tags(fill(t, subject, facts.relations.get(d, "")))
                     for d, texts in facts.templates.items() for t in texts}
            known = [fill(p, subject, facts.relations.get(domain, "")) for p in facts.paraphrases.get(domain, ())]
            wordings = known or [wrapper.replace("{text}", text) for wrapper in _WRAPPERS]
            return self._drawn(lambda: rng.choice(wordings), lambda found: found not in every, setting, out)
        pieces = [p for p in self._pieces(text, wording, subject, relation) if not p.subject]
        content = [p for p in pieces if self.tagger.content(p.word, p.tag)]
        choices: dict[_Piece, Sequence[str]]
        if setting == "disfluent":
            choices = {p: [w for w in self.words.get(p.tag, []) if w not in taken] for p in content}
            lacking = next((p.tag for p in content if not choices[p]), None)
            if not content or lacking:
                raise _Cannot(f"no words with the tag {lacking}" if lacking else "no content word")
        else:
            lists = self._listed(facts, f"{setting}s")
            choices = {p: lists[p.word.lower()] for p in content if lists.get(p.word.lower())}
            asked = [p for p in content if p.relation]
            if not choices or (setting == "antonym" and asked and not any(p in choices for p in asked)):
                raise _Cannot(f"no {setting}")

        def draw() -> dict[_Piece, str]:
            return {p: rng.choice(words) for p, words in choices.items()}

        return self._drawn(lambda: _replaced(text, draw()), lambda found: found == tags, setting, out)

    def _drawn(self, draw: Callable[[], str], right: Callable[[tuple[str, ...]], bool], setting: str,
               out: QuestionSet) -> str:
        for _ in range(self.tries):
            text = draw()
            if right(self.tagger.tags(text)):
                return text
            out.redrawn[setting] += 1
        raise _Cannot("its tags")

    def _listed(self, facts: DomainFacts, name: str) -> dict[str, tuple[str, ...]]:
        lists: dict[str, tuple[str, ...]] = {w: tuple(v) for w, v in getattr(self, name).items()}
        for word, more in getattr(facts, name).items():
            lists[word] = tuple(dict.fromkeys((*lists.get(word, ()), *more)))
        return lists

    def _pieces(self, text: str, wording: str, subject: str, relation: str) -> list[_Piece]:
        """The words of a filled template, each with its place."""
        before = wording[:wording.index("{subject}")].replace("{relation}", relation)
        held = range(len(before), len(before) + len(subject))
        asked: set[int] = set()
        place = wording.find("{relation}")
        if place >= 0:
            start = len(wording[:place].replace("{subject}", subject))
            asked = set(range(start, start + len(relation)))
        out: list[_Piece] = []
        at = 0
        for word, tag in self.tagger(text):
            start = text.find(word, at)
            if start < 0:
                raise _Cannot("the tagger's words are not those of the text")
            at = start + len(word)
            out.append(_Piece(start, at, word, tag, start < held.stop and at > held.start,
                              any(n in asked for n in range(start, at))))
        return out


def _replaced(text: str, new: Mapping[_Piece, str]) -> str:
    for piece in sorted(new, reverse=True):
        word = new[piece]
        word = word[:1].upper() + word[1:] if piece.word[:1].isupper() else word
        text = text[:piece.start] + word + text[piece.end:]
    return text


def wordnet_words(rows: Iterable[Mapping[str, Any]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Synonyms and antonyms by word, out of WordNet's synsets; base forms, which a tagger then has to check.

    Args:
        rows: synsets as ``looseleaf_lab.data.rows("wordnet")`` has them: ``id``, ``words`` and ``antonyms``, a list of
            "id:number of the word here:number there".
    """
    synsets = {str(row["id"]): row for row in rows}
    synonyms: dict[str, list[str]] = {}
    antonyms: dict[str, list[str]] = {}
    for row in synsets.values():
        single = [w for w in row["words"] if " " not in w and w.islower()]
        for word in single:
            synonyms.setdefault(word, []).extend(w for w in single if w != word)
        for link in row.get("antonyms", ()):
            other, here, there = str(link).split(":")
            word, opposite = row["words"][int(here) - 1], synsets[other]["words"][int(there) - 1]
            if " " not in word + opposite:
                antonyms.setdefault(word, []).append(opposite)
    return tuple({w: list(dict.fromkeys(v)) for w, v in found.items() if v}  # type: ignore[return-value]
                 for found in (synonyms, antonyms))


__all__ = ["BREAKING", "PRESERVING", "SETTINGS", "Question", "QuestionSet", "Reading", "Variants", "wordnet_words"]
