"""Which part-of-speech patterns of a labelled corpus give its domains away."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from looseleaf_syntactic_domain.tagging import Tagged, TagSet, sequences

Texts = Sequence[str | Sequence[tuple[str, str]]]
"""Texts, or texts that were tagged beforehand as (word, tag) pairs."""


class Template(NamedTuple):
    """A sequence of tags.

    Attributes:
        tags: the tags.
        occurrences: how often it occurs.
        texts: in how many texts.
    """

    tags: tuple[str, ...]
    occurrences: int
    texts: int


def templates(texts: Texts, *, n: int | None = 5, top_n: int = 100, tagger: Any = "built-in",
              tagset: TagSet = "fine") -> list[Template]:
    """The most frequent sequences of n tags within one text, as the authors' toolkit ``diversity`` extracts them.

    Args:
        texts: the texts.
        n: length of a sequence; None: the whole text's.
        top_n: how many; ties go to the one that comes first in the alphabet, so that the result does not depend on the
            order of the texts.
        tagger, tagset: see :class:`TextTagger`.

    Raises:
        ValueError: n or top_n below 1.
    """
    if (n is not None and n < 1) or top_n < 1:
        raise ValueError(f"expected n >= 1 or None and top_n >= 1, got n={n}, top_n={top_n}")
    return _templates([_grams(tagged, n) for tagged in sequences(texts, tagger, tagset)], top_n)


def _templates(grams: Sequence[Sequence[tuple[str, ...]]], top_n: int) -> list[Template]:
    counts = Counter(gram for text in grams for gram in text)
    holding = Counter(gram for text in grams for gram in set(text))
    return [Template(tags, count, holding[tags])
            for tags, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:top_n]]


def _grams(tagged: Tagged, n: int | None) -> list[tuple[str, ...]]:
    tags = tuple(tag for _, tag in tagged)
    if n is None:
        return [tags] if tags else []
    return [tags[i:i + n] for i in range(len(tags) - n + 1)]


def template_rate(texts: Texts, known: Sequence[Template], *, tagger: Any = "built-in",
                  tagset: TagSet = "fine") -> float:
    """The fraction of texts that have at least one of the templates."""
    found = _matches(texts, known, tagger, tagset)
    return sum(count > 0 for count, _ in found) / len(found)


def templates_per_token(texts: Texts, known: Sequence[Template], *, tagger: Any = "built-in",
                        tagset: TagSet = "fine") -> list[float]:
    """For each text the matches of the templates, overlapping ones each, per word."""
    return [count / length if length else 0.0 for count, length in _matches(texts, known, tagger, tagset)]


def _matches(texts: Texts, known: Sequence[Template], tagger: Any, tagset: TagSet) -> list[tuple[int, int]]:
    """Of each text the number of matches, of tags and never of parts of them, and the number of words."""
    wanted: dict[int, set[tuple[str, ...]]] = {}
    for template in known:
        wanted.setdefault(len(template.tags), set()).add(template.tags)
    tagged = sequences(texts, tagger, tagset)
    if not tagged:
        raise ValueError("texts: expected one or more, got none")
    return [(sum(gram in tags for n, tags in wanted.items() for gram in _grams(text, n)), len(text))
            for text in tagged]


# ------------------------------------------------------------------------------------------------------ association
class Association(NamedTuple):
    """How much a template says about a domain; texts are counted, not occurrences.

    Attributes:
        tags: the template.
        domain: the domain.
        inside, outside: texts of the domain, and of the others, that have it.
        lift: P(template | domain) / P(template).
        bits: log2 of it; minus infinity where the domain has none.
        g: statistic of the G-test of independence, one degree of freedom.
        p, q: its p-value, and that after Benjamini and Hochberg over all pairs that were tested.
    """

    tags: tuple[str, ...]
    domain: str
    inside: int
    outside: int
    lift: float
    bits: float
    g: float
    p: float
    q: float

    @property
    def spurious(self) -> bool:
        """Whether the template points to the domain: lift above 1 and q below 0.05."""
        return self.lift > 1 and self.q < 0.05


def spurious(texts: Texts, domains: Sequence[str], *, n: int | None = 5, top_n: int = 100, tagger: Any = "built-in",
             tagset: TagSet = "fine", expected: float = 5.0) -> list[Association]:
    """Every template against every domain, the most telling first.

    Args:
        texts: the texts. domains: of each.
        n, top_n, tagger, tagset: see :func:`templates`.
        expected: least number of texts that chance alone would put into each cell of the table of a test; the G-test is
            too bold below. Pairs with fewer are not tested [ours].

    Raises:
        ValueError: not as many domains as texts, or a single domain.
    """
    return _associations([_grams(tagged, n) for tagged in sequences(texts, tagger, tagset)], domains, top_n, expected)


def _associations(grams: Sequence[Sequence[tuple[str, ...]]], domains: Sequence[str], top_n: int,
                  expected: float) -> list[Association]:
    if len(grams) != len(domains):
        raise ValueError(f"domains: expected one for each of {len(grams)} texts, got {len(domains)}")
    sizes = Counter(domains)
    if len(sizes) < 2:
        raise ValueError(f"domains: expected two or more, got {', '.join(map(str, sizes)) or 'none'}")
    holding: dict[tuple[str, ...], Counter[str]] = {t.tags: Counter() for t in _templates(grams, top_n)}
    for text, domain in zip(grams, domains, strict=True):
        for gram in set(text):
            if gram in holding:
                holding[gram][domain] += 1
    tested: list[tuple[tuple[str, ...], str, int, int, float, float]] = []
    for tags, found in holding.items():
        total = sum(found.values())
        for domain, size in sizes.items():
            table = np.array([[found[domain], total - found[domain]],
                              [size - found[domain], len(grams) - size - total + found[domain]]], dtype=float)
            chance = np.outer(table.sum(1), table.sum(0)) / len(grams)
            if chance.min() >= expected:
                tested.append((tags, domain, found[domain], total - found[domain],
                               found[domain] / size / (total / len(grams)), g_statistic(table)))
    p = [math.erfc(math.sqrt(g / 2)) for *_, g in tested]
    out = [Association(tags, domain, inside, outside, lift, math.log2(lift) if lift else -math.inf, g, p[i], q)
           for i, ((tags, domain, inside, outside, lift, g), q) in enumerate(zip(tested, adjusted(p), strict=True))]
    return sorted(out, key=lambda a: (-a.spurious, a.q, -a.lift, a.tags, a.domain))


def g_statistic(table: np.ndarray) -> float:
    """2 sum observed ln(observed / expected) of a table of counts, expected under independence."""
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    seen = table > 0
    return max(0.0, float(2 * (table[seen] * np.log(table[seen] / expected[seen])).sum()))


def adjusted(p: Sequence[float]) -> list[float]:
    """p-values after Benjamini and Hochberg, in the order given."""
    order = np.argsort(p, kind="stable")
    ranked = np.asarray(p, dtype=float)[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty(len(p))
    q[order] = np.minimum.accumulate(ranked[::-1])[::-1].clip(max=1) if len(p) else []
    found: list[float] = q.tolist()
    return found


# ---------------------------------------------------------------------------------------------------------- controls
@dataclass(frozen=True)
class Cue:
    """How well one thing about a text tells its domain, on texts that were not learned from.

    Attributes:
        name: the cue.
        right: whether the domain of each text was told.
    """

    name: str
    right: np.ndarray

    @property
    def accuracy(self) -> float:
        """The mean."""
        return float(self.right.mean())


def cues(texts: Texts, domains: Sequence[str], *, n: int | None = 5, top_n: int = 100, tagger: Any = "built-in",
         tagset: TagSet = "fine", seed: int = 0) -> list[Cue]:
    """Tell the domain of each text by its templates, and by what needs no syntax: the controls of an audit.

    "templates": a naive Bayes guess from the templates that it has. "last word": from its last word alone. "frequency":
    the most frequent domain. "random labels": as templates, learned from shuffled domains. Each text is guessed from
    the other half of the texts. Templates that tell no more than the last word need not be what gives the domain away,
    and a guess from shuffled domains that is better than the most frequent one shows a fault.

    Args:
        texts, domains, n, top_n, tagger, tagset: see :func:`spurious`.
        seed: of the halves and of the shuffle.

    Raises:
        ValueError: as :func:`spurious`, or fewer than two texts.
    """
    tagged = sequences(texts, tagger, tagset)
    if len(tagged) != len(domains) or len(tagged) < 2:
        raise ValueError(f"domains: expected one for each of two texts or more, got {len(domains)} for {len(tagged)}")
    rng = np.random.default_rng(seed)
    order = sorted(rng.permutation(len(tagged)), key=lambda i: str(domains[i]))  # each domain is halved
    halves = order[::2], order[1::2]
    shuffled = [domains[i] for i in rng.permutation(len(domains))]
    patterns = [set(_grams(text, n)) for text in tagged]
    last = [{next((w.lower() for w, _ in reversed(text) if any(map(str.isalnum, w))), "")} for text in tagged]

    def told(features: Sequence[set[Any]], labels: Sequence[str], limit: int | None) -> np.ndarray:
        right = np.zeros(len(tagged))
        for train, test in (halves, halves[::-1]):
            guess = _naive_bayes([features[i] for i in train], [labels[i] for i in train], limit)
            right[test] = [guess(features[i]) == domains[i] for i in test]
        return right

    nothing: list[set[Any]] = [set()] * len(tagged)
    return [Cue("templates", told(patterns, domains, top_n)), Cue("last word", told(last, domains, None)),
            Cue("frequency", told(nothing, domains, None)), Cue("random labels", told(patterns, shuffled, top_n))]


def _naive_bayes(features: Sequence[set[Any]], labels: Sequence[str], limit: int | None) -> Callable[[set[Any]], str]:
    """A guess of the label from the features that are there, counts smoothed by one half."""
    sizes = Counter(labels)
    known: dict[Hashable, Counter[str]] = {}
    for own, label in zip(features, labels, strict=True):
        for feature in own:
            known.setdefault(feature, Counter())[label] += 1
    kept = sorted(known, key=lambda f: (-sum(known[f].values()), f))[:limit]
    weights = {f: {d: math.log((known[f][d] + 0.5) / (size + 1)) for d, size in sizes.items()} for f in kept}

    def guess(own: set[Any]) -> str:
        score = {d: math.log(size) + sum(weights[f][d] for f in own if f in weights) for d, size in sizes.items()}
        return max(sorted(score), key=score.__getitem__)

    return guess


__all__ = ["Association", "Cue", "Template", "Texts", "adjusted", "cues", "g_statistic", "spurious", "template_rate",
           "templates", "templates_per_token"]
