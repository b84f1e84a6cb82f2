"""Part-of-speech tags: any tagger under one of three tag sets, and a small built-in tagger that needs nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

TagSet = Literal["fine", "universal", "coarse"]
Tagged = list[tuple[str, str]]
"""The words of a text, each with its tag."""

_CLOSED = {
    "WP": "what who whom", "WDT": "which whichever", "WRB": "where when why how", "DT": "the a an this these every",
    "IN": "of in for from with about by at on as", "TO": "to", "MD": "can could will would should may might must",
    "PRP": "i me you we us it they them he him she", "PRP$": "my your our its their his her", "CC": "and or but",
    "VBZ": "is has does", "VBP": "are do have am", "VBD": "was were did had", "UH": "please", "POS": "'s",
}
_OPEN = {
    "NN": """kettle ladder pencil storm candle garden mirror rocket sandwich violin window carpet thunder basket button
        hammer jacket lantern marble needle pillow saddle tunnel velvet walnut""",
    "NNS": """kettles ladders pencils storms candles gardens mirrors rockets sandwiches violins windows carpets baskets
        buttons hammers jackets lanterns marbles needles pillows""",
    "VB": """sit bake carve fetch grind howl juggle knit melt nod rinse sew throw wander climb scrub whistle yawn""",
    "VBP": """cling drift glow lurk mumble perch roam shiver sneeze stumble""",
    "VBZ": """sits bakes carves fetches grinds howls juggles knits melts nods rinses sews throws wanders climbs""",
    "VBD": """sang ran went ate wrote flew swam drank spoke rose fell drew""",
    "VBN": """clouded baked carved folded knitted melted painted rinsed scrubbed sewn thrown woven""",
    "VBG": """sitting baking carving folding grinding howling juggling knitting melting nodding rinsing sewing""",
    "JJ": """purple wooden hungry silent muddy brittle crooked dusty fuzzy gloomy hollow jagged lumpy noisy oily rusty
        salty tiny damp sleepy""",
    "RB": """sideways loudly upwards seldom gently clumsily downhill indoors overhead backwards lazily nervously""",
}
WORDS: dict[str, tuple[str, ...]] = {tag: tuple(words.split()) for tag, words in _OPEN.items()}
"""Penn tag -> words that disfluent questions are made of."""

_BE = frozenset(("be", "am", "is", "are", "was", "were", "been", "being"))
_FUNCTION = _BE | frozenset(["have", "has", "had", "having", "do", "does", "did", "doing", "done", "not", "n't"])
_UNIVERSAL = {
    "NN": "NOUN", "NNS": "NOUN", "NNP": "PROPN", "NNPS": "PROPN", "JJ": "ADJ", "JJR": "ADJ", "JJS": "ADJ", "AFX": "ADJ",
    "RB": "ADV", "RBR": "ADV", "RBS": "ADV", "WRB": "SCONJ", "MD": "AUX", "PRP": "PRON", "PRP$": "PRON", "WP": "PRON",
    "WP$": "PRON", "EX": "PRON", "DT": "DET", "PDT": "DET", "WDT": "DET", "IN": "ADP", "RP": "ADP", "TO": "PART",
    "POS": "PART", "CC": "CCONJ", "CD": "NUM", "UH": "INTJ", "FW": "X", "LS": "X",
}


class LexiconTagger:
    """A tagger that looks words up: Penn tags, the same whatever stands around a word.

    It knows the words of the built-in questions. A word it does not know is a name where it begins with a capital, a
    number where it is one, and otherwise what its ending says. For texts of your own take spaCy.

    Args:
        words: tag -> further words, in lower case; they come before the built-in ones.
    """

    name = "built-in"

    def __init__(self, words: Mapping[str, Iterable[str]] | None = None) -> None:
        self._tags = {word: tag for tag, known in _CLOSED.items() for word in known.split()}
        for more in (WORDS, words or {}):
            self._tags |= {word.lower(): tag for tag, known in more.items() for word in known}

    def __call__(self, text: str) -> Tagged:
        """Words and tags of a text."""
        words = re.findall(r"'s\b|\w+(?:-\w+)*|[^\w\s]", text)
        return [(word, self._tag(word)) for word in words]

    def _tag(self, word: str) -> str:
        known = self._tags.get(word.lower())
        if known is not None:
            return known
        if not word[0].isalnum():
            return "." if word in ".?!" else word
        if word[0].isdigit():
            return "CD"
        if word[0].isupper():
            return "NNP"
        endings = {"ly": "RB", "ing": "VBG", "ed": "VBD", "s": "NNS"}
        return next((tag for ending, tag in endings.items() if word.endswith(ending)), "NN")


class TextTagger:
    """Words and tags of texts under one tag set, each text tagged once.

    Args:
        tagger: ``"built-in"``; the name of an installed spaCy model; a spaCy ``Language`` with a tagger; or a function
            from a text to its words and tags.
        tagset: ``"fine"``: the tags as they come, of spaCy its fine ones (Penn). ``"universal"``: spaCy's ``pos_``; the
            Penn tags of other taggers are mapped. ``"coarse"``: fine tags with question adverbs (WRB) among the adverbs
            and all forms of verbs together, so that "Where is Paris located?" and "Quickly sit Paris clouded?" agree.

    Attributes:
        name: of the tagger.

    Raises:
        ValueError: not a tagger, or a spaCy model that is not installed.
    """

    def __init__(self, tagger: Any = "built-in", tagset: TagSet = "fine") -> None:
        if isinstance(tagger, TextTagger):
            tagger = tagger.source
        if tagset not in ("fine", "universal", "coarse"):
            raise ValueError(f"tagset: expected 'fine', 'universal' or 'coarse', got {tagset!r}")
        if isinstance(tagger, str):
            tagger = _built_in() if tagger == "built-in" else _spacy_model(tagger)
        if not callable(tagger):
            raise ValueError("tagger: expected 'built-in', the name of a spaCy model, a spaCy Language or a function "
                             f"from a text to (word, tag) pairs, got {type(tagger).__name__}")
        self.source: Any = tagger
        self.tagset = tagset
        self._spacy = hasattr(tagger, "pipe_names") and hasattr(tagger, "vocab")
        if self._spacy:
            meta = getattr(tagger, "meta", {})
            self.name = f"spaCy {meta.get('lang', '')}_{meta.get('name', '')} {meta.get('version', '')}"
        else:
            self.name = str(getattr(tagger, "name", None) or getattr(tagger, "__name__", type(tagger).__name__))
        self._known: dict[str, Tagged] = {}

    def __call__(self, text: str) -> Tagged:
        """The words of a text with their tags under the tag set.

        Raises:
            ValueError: the tagger gives something else, or a spaCy pipeline has no tagger.
        """
        if text not in self._known:
            self._known[text] = self._tagged(text)
        return self._known[text]

    def tags(self, text: str) -> tuple[str, ...]:
        """The tags alone: the template of a text."""
        return tuple(tag for _, tag in self(text))

    def mapped(self, word: str, tag: str) -> str:
        """A fine tag under the tag set."""
        if self.tagset == "fine":
            return tag
        if self.tagset == "coarse":
            return "RB" if tag == "WRB" else "VB" if tag.startswith("VB") else tag
        if tag.startswith("VB"):
            return "AUX" if word.lower() in _BE else "VERB"
        return _UNIVERSAL.get(tag, tag if tag[:1].isalpha() else "PUNCT")

    def content(self, word: str, tag: str) -> bool:
        """Whether a word carries meaning: nouns, verbs, adjectives, adverbs, no names and no auxiliaries.

        Under the coarse tag set question adverbs and forms of "be" are what they are tagged as.
        """
        if self.tagset == "universal":
            return tag in ("NOUN", "VERB", "ADJ", "ADV") and word.lower() not in _FUNCTION
        kind = tag.startswith(("NN", "VB", "JJ", "RB")) and not tag.startswith("NNP")
        return kind and (self.tagset == "coarse" or word.lower() not in _FUNCTION)

    def _tagged(self, text: str) -> Tagged:
        if self._spacy:
            off = [name for name in ("parser", "ner", "lemmatizer") if name in self.source.pipe_names]
            tokens = [token for token in self.source(text, disable=off) if not token.is_space]
            if tokens and not any(token.tag_ for token in tokens):
                raise ValueError(f"tagger: expected a spaCy pipeline with a tagger, got {self.name}, which tags "
                                 f"nothing (pipes: {', '.join(self.source.pipe_names) or 'none'}): load a model such "
                                 "as en_core_web_sm")
            if self.tagset == "universal":
                return [(token.text, token.pos_) for token in tokens]
            return [(token.text, self.mapped(token.text, token.tag_)) for token in tokens]
        try:
            pairs = [(str(word), str(tag)) for word, tag in self.source(text)]
        except (TypeError, ValueError) as error:
            raise ValueError(f"tagger: expected (word, tag) pairs of {text!r:.80}, got something else from {self.name} "
                             f"({error})") from error
        return [(word, self.mapped(word, tag)) for word, tag in pairs]


def sequences(texts: Sequence[str | Sequence[tuple[str, str]]], tagger: Any = "built-in",
              tagset: TagSet = "fine") -> list[Tagged]:
    """Words and tags of each text; a text may also be given as (word, tag) pairs, tagged beforehand.

    Raises:
        ValueError: neither a text nor such pairs.
    """
    if isinstance(texts, str):
        raise ValueError("texts: expected a list of texts, got one text")
    tags = TextTagger(tagger, tagset)
    out: list[Tagged] = []
    for number, text in enumerate(texts):
        if isinstance(text, str):
            out.append(tags(text))
            continue
        try:
            out.append([(str(word), tags.mapped(str(word), str(tag))) for word, tag in text])
        except (TypeError, ValueError):
            raise ValueError(f"texts: expected texts or lists of (word, tag) pairs, got {text!r:.80} as number "
                             f"{number}") from None
    return out


def _built_in() -> Callable[[str], Tagged]:
    from looseleaf_syntactic_domain.facts import LEXICON

    return LexiconTagger(LEXICON)


def _spacy_model(name: str) -> Any:
    try:
        import spacy
    except ModuleNotFoundError as error:
        raise ValueError(f"tagger: expected 'built-in' or the name of a spaCy model, got {name!r}, and spaCy is not "
                         "installed: pip install 'looseleaf-syntactic-domain[spacy]', then python -m spacy download "
                         "en_core_web_sm") from error
    try:
        return spacy.load(name)
    except OSError as error:
        raise ValueError(f"tagger: expected 'built-in' or an installed spaCy model, got {name!r}: python -m spacy "
                         f"download {name}") from error


__all__ = ["WORDS", "LexiconTagger", "TagSet", "Tagged", "TextTagger", "sequences"]
