"""Facts in domains, the templates that ask for them, and the built-in example: countries."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple

from looseleaf.errors import did_you_mean


class Fact(NamedTuple):
    """One answer: of a subject, in a domain."""

    subject: str
    domain: str
    answer: str


class Row(NamedTuple):
    """One solved question to train on.

    Attributes:
        prompt: the question as the model is shown it.
        answer: what is learned, with its leading space and ending.
        text: the question alone.
        subject, domain: whose answer, to what.
        template: the domain whose template it is, and its number there.
    """

    prompt: str
    answer: str
    text: str
    subject: str
    domain: str
    template: tuple[str, int]


Words = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class DomainFacts:
    """Subjects with an answer in each of several domains, and the templates of each domain.

    Attributes:
        facts: the answers; one for each subject and domain. A subject may lack some.
        templates: domain -> questions, each with ``{subject}`` once. ``{relation}`` stands for what is asked for, so
            that a template can be asked in another domain as well; without it the content words are exchanged.
        relations: domain -> the words for ``{relation}``.
        paraphrases: domain -> further wordings of its question, for the setting "paraphrase".
        synonyms, antonyms: word in lower case -> words of the same tag that keep, or break, the meaning.
        form: how a question is put to the model, with ``{text}`` once.
        ending: what follows an answer in training and scoring, such as a full stop.

    Raises:
        ValueError: one domain, none of its templates, a template without its slot, two answers for a subject in a
            domain, a domain with fewer than two different answers, or ``{relation}`` without words for it.
    """

    facts: tuple[Fact, ...]
    templates: Words
    relations: Mapping[str, str] = field(default_factory=dict)
    paraphrases: Words = field(default_factory=dict)
    synonyms: Words = field(default_factory=dict)
    antonyms: Words = field(default_factory=dict)
    form: str = "Question: {text}\nAnswer:"
    ending: str = ""

    def __post_init__(self) -> None:
        for name in ("templates", "paraphrases", "synonyms", "antonyms"):
            lists = getattr(self, name)
            if not isinstance(lists, Mapping) or any(isinstance(v, str) for v in lists.values()):
                raise ValueError(f"{name}: expected lists of texts by name, got {lists!r:.80}")
            object.__setattr__(self, name, {str(k): tuple(v) for k, v in lists.items()})
        object.__setattr__(self, "facts", _facts(self.facts))
        if self.form.count("{text}") != 1:
            raise ValueError(f"form: expected a text with {{text}} once, got {self.form!r}")
        known = Counter((f.subject, f.domain) for f in self.facts)
        twice = next((pair for pair, count in known.items() if count > 1), None)
        if twice is not None:
            both = [f.answer for f in self.facts if (f.subject, f.domain) == twice]
            raise ValueError(f"facts: expected one answer for each subject and domain, got "
                             f"{' and '.join(map(repr, both))} for {twice[0]!r} in {twice[1]!r}")
        if len(self.domains) < 2:
            raise ValueError(f"facts: expected two domains or more, got {', '.join(self.domains) or 'none'}: what a "
                             "template gives away cannot be told from one")
        for domain in self.domains:
            if not self.templates.get(domain):
                raise ValueError(f"templates: expected one or more for the domain {domain!r}, got none."
                                 f"{did_you_mean(domain, self.templates)}")
            if len(set(self.answers(domain))) < 2:
                raise ValueError(f"facts: expected two different answers or more in the domain {domain!r}, got "
                                 f"{self.answers(domain)}")
        for kind in ("templates", "paraphrases"):
            for domain, texts in getattr(self, kind).items():
                if domain not in self.domains:
                    raise ValueError(f"{kind}: expected the domains of the facts, {', '.join(self.domains)}, got "
                                     f"{domain!r}.{did_you_mean(domain, self.domains)}")
                for text in texts:
                    if text.count("{subject}") != 1:
                        raise ValueError(f"{kind}: expected {{subject}} once in each, got {text!r} for the domain "
                                         f"{domain!r}")
                    if "{relation}" in text and not all(self.relations.get(d) for d in self.domains):
                        lacking = next(d for d in self.domains if not self.relations.get(d))
                        raise ValueError(f"relations: expected words for {{relation}} in each domain, as {text!r} has "
                                         f"it, got none for {lacking!r}")

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains, in the order of the facts."""
        return tuple(dict.fromkeys(fact.domain for fact in self.facts))

    @property
    def subjects(self) -> tuple[str, ...]:
        """The subjects, in the order of the facts."""
        return tuple(dict.fromkeys(fact.subject for fact in self.facts))

    @property
    def known(self) -> dict[tuple[str, str], str]:
        """(subject, domain) -> answer."""
        return {(fact.subject, fact.domain): fact.answer for fact in self.facts}

    def answers(self, domain: str) -> list[str]:
        """All answers of a domain, one for each subject that has one."""
        return [fact.answer for fact in self.facts if fact.domain == domain]

    def part(self, subjects: Iterable[str]) -> DomainFacts:
        """The same with fewer subjects."""
        kept = set(subjects)
        return DomainFacts(tuple(f for f in self.facts if f.subject in kept),
                           **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "facts"})

    def to_json(self) -> str:
        """The facts as text, such as a file for ``looseleaf run syntactic-domain --text``."""
        return json.dumps({**asdict(self), "facts": [fact._asdict() for fact in self.facts]}, indent=1,
                          ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> DomainFacts:
        """What :meth:`to_json` wrote; every field but facts and templates may be left out.

        Raises:
            ValueError: not such a text.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError("expected domains, facts and templates in JSON, as DomainFacts.to_json writes them, got "
                             f"something else ({error})") from error
        names = {f.name for f in fields(cls)}
        unknown = [key for key in data if key not in names] if isinstance(data, dict) else []
        if not isinstance(data, dict) or unknown or not {"facts", "templates"} <= set(data):
            raise ValueError(f"expected facts and templates, and perhaps {', '.join(sorted(names))}, got "
                             f"{', '.join(data) or 'none' if isinstance(data, dict) else type(data).__name__}."
                             + (did_you_mean(unknown[0], names) if unknown else ""))
        return cls(**data)


def _facts(rows: Iterable[Any]) -> tuple[Fact, ...]:
    out = []
    for row in rows:
        try:
            fact = Fact(**row) if isinstance(row, Mapping) else Fact(*row)
        except TypeError:
            raise ValueError(f"facts: expected subject, domain and answer, got {row!r:.100}") from None
        if not all(isinstance(part, str) and part.strip() for part in fact):
            raise ValueError(f"facts: expected texts that are not empty, got {fact}")
        out.append(fact)
    return tuple(out)


def build(facts: DomainFacts, mode: Literal["disjoint", "diverse"] = "disjoint",
          subjects: Sequence[str] | None = None) -> list[Row]:
    """Solved questions to train on, whose templates give the domain away, or do not.

    Args:
        facts: each subject needs an answer in each domain, or the subject alone would give the answer; each template
            of mode "diverse" needs ``{relation}``.
        mode: "disjoint": each domain is asked for by its own templates alone. "diverse": by the templates of all.
        subjects: some of the subjects; None: all.

    Raises:
        ValueError: another mode, a subject without an answer in some domain, or a template that cannot be shared.
    """
    if mode not in ("disjoint", "diverse"):
        raise ValueError(f"mode: expected 'disjoint' or 'diverse', got {mode!r}")
    known = facts.known
    rows = []
    for subject in facts.subjects if subjects is None else subjects:
        for domain in facts.domains:
            if (subject, domain) not in known:
                raise ValueError(f"facts: expected an answer of each subject in each domain, got none for {subject!r} "
                                 f"in {domain!r}: the subject alone would give the answer. Leave it out")
            for owner in facts.domains if mode == "diverse" else (domain,):
                for number, template in enumerate(facts.templates[owner]):
                    if owner != domain and "{relation}" not in template:
                        raise ValueError("templates: expected {relation} in each for mode 'diverse', got "
                                         f"{template!r}")
                    text = fill(template, subject, facts.relations.get(domain, ""))
                    answer = f" {known[subject, domain]}{facts.ending}"
                    rows.append(Row(facts.form.replace("{text}", text), answer, text, subject, domain, (owner, number)))
    return rows


def fill(template: str, subject: str, relation: str) -> str:
    """A template with its slots filled; a relation at the beginning is capitalised."""
    text = template.replace("{relation}", relation).replace("{subject}", subject)
    return text[:1].upper() + text[1:] if template.startswith("{relation}") else text


# -------------------------------------------------------------------------------------------------- built-in example
_COUNTRIES = """
Japan Tokyo yen Japanese; Poland Warsaw zloty Polish; Sweden Stockholm krona Swedish; Thailand Bangkok baht Thai;
Vietnam Hanoi dong Vietnamese; Hungary Budapest forint Hungarian; Turkey Ankara lira Turkish;
Russia Moscow ruble Russian; Israel Jerusalem shekel Hebrew; Brazil Brasilia real Portuguese;
Ukraine Kyiv hryvnia Ukrainian; Czechia Prague koruna Czech; Denmark Copenhagen krone Danish;
Romania Bucharest leu Romanian;
Egypt Cairo pound Arabic; Iran Tehran rial Persian; China Beijing yuan Mandarin; Indonesia Jakarta rupiah Indonesian;
Bangladesh Dhaka taka Bengali; Mongolia Ulaanbaatar tugrik Mongolian; Georgia Tbilisi lari Georgian;
Armenia Yerevan dram Armenian; Albania Tirana lek Albanian; Kazakhstan Astana tenge Kazakh
"""
TEMPLATES = {
    "capital": ("What is the {relation} of {subject}?", "Which {relation} does {subject} have?",
                "Please name the main {relation} of {subject}."),
    "currency": ("In {subject}, what is the common {relation}?", "Tell me the {relation} that {subject} uses.",
                 "{subject} has which official {relation}?"),
    "language": ("Do you know the {relation} of {subject}?", "Can anyone quickly say the {relation} of {subject}?",
                 "I want to learn the usual {relation} in {subject}."),
}
"""The built-in wordings of each domain."""
PARAPHRASES = ("{subject} and its {relation}: which is it?", "When we speak of {subject}, its {relation} is what?",
               "I ask about the {relation}. The place is {subject}.")
"""Wordings whose tags none of the built-in templates has."""
SYNONYMS: dict[str, tuple[str, ...]] = {
    "capital": ("metropolis",), "currency": ("money",), "language": ("tongue", "speech"),
    "main": ("chief", "principal"),
    "name": ("state", "give"), "common": ("usual", "ordinary"), "tell": ("give", "show"), "uses": ("employs", "adopts"),
    "official": ("formal",), "know": ("recall", "remember"), "quickly": ("promptly", "rapidly"),
    "say": ("state", "give"),
    "anyone": ("someone", "anybody"), "want": ("wish", "hope"), "learn": ("discover",), "usual": ("common", "ordinary"),
}
ANTONYMS: dict[str, tuple[str, ...]] = {
    "capital": ("village", "hamlet"), "currency": ("debt", "poverty"), "language": ("silence",), "main": ("minor",),
    "name": ("hide", "conceal"), "common": ("rare", "uncommon"), "tell": ("deny", "spare"),
    "uses": ("rejects", "abolishes"), "official": ("unofficial", "illegal"), "know": ("forget", "ignore"),
    "quickly": ("slowly",), "say": ("hide", "conceal"), "anyone": ("nobody",), "want": ("refuse", "hate"),
    "learn": ("forget",), "usual": ("unusual", "rare"),
}
LEXICON: dict[str, tuple[str, ...]] = {tag: tuple(words.split()) for tag, words in {
    "NN": """capital currency language metropolis money tongue speech village hamlet debt poverty silence anyone someone
        anybody nobody place""",
    "VB": """name state give tell show deny spare know recall remember forget ignore say hide conceal learn discover""",
    "VBP": "want wish hope refuse hate ask speak", "VBZ": "uses employs adopts rejects abolishes",
    "JJ": """main chief principal minor common usual ordinary rare uncommon official formal unofficial illegal
        unusual""",
    "RB": "quickly promptly rapidly slowly", "WDT": "that",
}.items()}
"""Penn tag -> words of the built-in templates, of their synonyms and antonyms."""


def countries(count: int = 24) -> DomainFacts:
    """Capital, currency and language of up to 24 countries, three templates for each domain.

    All lists are ours. No two of the nine templates have the same tags.

    Args:
        count: how many countries, 2 to 24.
    """
    rows = [row.split() for row in _COUNTRIES.replace("\n", " ").split(";")]
    if not 2 <= count <= len(rows):
        raise ValueError(f"count: expected an integer in [2, {len(rows)}], got {count}")
    domains = tuple(TEMPLATES)
    return DomainFacts(
        tuple(Fact(subject, domain, answer) for subject, *answers in rows[:count]
              for domain, answer in zip(domains, answers, strict=True)),
        TEMPLATES, {domain: domain for domain in domains}, dict.fromkeys(domains, PARAPHRASES), SYNONYMS, ANTONYMS)


__all__ = ["ANTONYMS", "LEXICON", "PARAPHRASES", "SYNONYMS", "TEMPLATES", "DomainFacts", "Fact", "Row", "build",
           "countries", "fill"]
