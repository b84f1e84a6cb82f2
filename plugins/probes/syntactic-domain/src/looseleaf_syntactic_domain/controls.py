"""Planted models: what they answer by is known, so that the probe can be checked on them."""

from __future__ import annotations

import hashlib
import math
from collections import Counter

from looseleaf_syntactic_domain.facts import DomainFacts, fill
from looseleaf_syntactic_domain.variants import Variants
from looseleaf_text import LanguageModel

RULES = ("correct", "entity memorisation", "prompt memorisation", "word-domain", "syntactic-domain", "frequency",
         "last word", "guesses")
"""Behaviours of the paper, and three that the controls must catch."""


class PlantedModel(LanguageModel):
    """A made-up language model that answers by one rule; where the rule says nothing it guesses, the same each time.

    "correct" reads the words for the relation, whatever the sentence is like. "entity memorisation" likes every answer
    of the subject. "prompt memorisation" knows the exact questions of each domain's own templates. "word-domain" needs
    the words and the tags of an own template, "syntactic-domain" the tags alone: it gives the answer of the domain
    whose template they are. "frequency" prefers answers that are frequent in the domain, "last word" goes by the last
    word of the domain's own templates, and "guesses" draws.

    Args:
        facts: what it knows; with words for each relation.
        rule: one of :data:`RULES`.
        variants: its tagger and synonyms; None: the built-in ones.
        seed: of the guesses.

    Raises:
        ValueError: another rule, or a domain without words for its relation.
    """

    def __init__(self, facts: DomainFacts, rule: str, variants: Variants | None = None, seed: int = 0) -> None:
        if rule not in RULES:
            raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
        if not all(facts.relations.get(domain) for domain in facts.domains):
            raise ValueError(f"facts: expected words for the relation of each domain, got {dict(facts.relations)}")
        self.facts, self.rule, self.seed, self.name = facts, rule, seed, f"planted: {rule}"
        self.calls = self.tokens = 0
        tools = variants or Variants()
        self._tags, self._known = tools.tagger, facts.known
        self._words = {d: {facts.relations[d].lower(), *facts.synonyms.get(facts.relations[d].lower(), ())}
                       for d in facts.domains}
        self._frequency = Counter(fact.answer for fact in facts.facts)
        self._patterns: dict[str, dict[tuple[str, ...], str]] = {}
        self._texts: dict[str, str] = {}
        self._last: dict[str, set[str]] = {}
        for domain, texts in facts.templates.items():
            for template in texts:
                for subject in facts.subjects:
                    text = fill(template, subject, facts.relations[domain])
                    self._patterns.setdefault(subject, {})[self._tags.tags(text)] = domain
                    self._texts[text] = domain
                    self._last.setdefault(self._last_word(text), set()).add(domain)

    def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
        """See :meth:`LanguageModel.score`; the log-probabilities are relative ones."""
        self.calls += len(prefixes)
        out = []
        for prefix, row in zip(prefixes, continuations, strict=True):
            wanted = self.favoured(prefix)
            out.append([-0.1 if self._bare(c) in wanted else self._guess(prefix, self._bare(c)) for c in row])
        return out

    def generate(self, prompts: list[str], max_tokens: int, stop: list[str] | None = None, temperature: float = 0.0,
                 seed: int = 0) -> list[str]:
        """See :meth:`LanguageModel.generate`: the favoured answer, or a guess of all that there are."""
        self.calls += len(prompts)
        answers = sorted(self._frequency)
        return [f" {max(sorted(self.favoured(p)) or answers, key=lambda a, p=p: self._guess(p, a))}"  # type: ignore[misc]
                for p in prompts]

    def tokenize(self, text: str) -> list[int]:
        """One token for each character."""
        return list(map(ord, text))

    def detokenize(self, ids: list[int]) -> str:
        """The characters."""
        return "".join(map(chr, ids))

    def favoured(self, prompt: str) -> set[str]:
        """The answers that the rule is for; empty where it says nothing."""
        before, after = self.facts.form.split("{text}")
        text = prompt.removeprefix(before).removesuffix(after)
        subject = max((s for s in self.facts.subjects if s in text), key=len, default="")
        rule, words = self.rule, {word.lower() for word, _ in self._tags(text)}
        pattern = self._patterns.get(subject, {}).get(self._tags.tags(text))
        asked = {d for d, names in self._words.items() if names & words}
        domains: set[str | None] = {
            "correct": asked, "entity memorisation": {*self.facts.domains},
            "prompt memorisation": {self._texts.get(text)}, "syntactic-domain": {pattern},
            "word-domain": {pattern} & asked, "last word": self._last.get(self._last_word(text), set()),
        }.get(rule, set())  # type: ignore[assignment]
        if rule == "last word" and len(domains) > 1:
            return set()
        return {self._known[subject, d] for d in domains if d is not None and (subject, d) in self._known}

    def _guess(self, prompt: str, answer: str) -> float:
        if self.rule == "frequency":
            return math.log(self._frequency[answer] / len(self.facts.facts)) - 1 + 1e-6 * self._noise(answer)
        return -5 - self._noise(f"{prompt}|{answer}")

    def _noise(self, text: str) -> float:
        return int(hashlib.sha256(f"{self.seed}|{text}".encode()).hexdigest()[:8], 16) / 16 ** 8

    def _bare(self, continuation: str) -> str:
        return continuation.strip().removesuffix(self.facts.ending)

    def _last_word(self, text: str) -> str:
        return next((w.lower() for w, _ in reversed(self._tags(text)) if any(map(str.isalnum, w))), "")


__all__ = ["RULES", "PlantedModel"]
