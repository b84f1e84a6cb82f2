"""Windows of running text: the words that are read, and the class of the word that comes next."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from looseleaf import files
from looseleaf_word_class.separation import ordered

Text = Sequence[Sequence[str]]
"""Running text: (word, class), or (word, class, white space after it)."""
PUNCTUATION = (".", "PUNCT")
UNKNOWN = ("X", "SPACE", "_", "")
"""Classes that a next word may not have: windows before such a word are left out, and counted."""
_NO_SPACE_BEFORE = frozenset([*".,;:?!)]}%”", "''", "n't", "'s", "'ll", "'re", "'ve", "'d", "'m"])
_NO_SPACE_AFTER = frozenset([*"([{“$£", "``"])


@dataclasses.dataclass(frozen=True)
class Windows:
    """Contexts and the labels of what comes next; all lists are of one length.

    Attributes:
        contexts: the words read.
        written: the same as a text.
        labels: class of the next word, or any label of the user's.
        texts: number of the text that the window is from.
        last: class of the last word read; None: unknown.
        next_words: the next word; None: unknown.
        counts: how often the next word occurs in all texts; None: unknown.
        left_out: why windows were left out -> how many.
    """

    contexts: list[tuple[str, ...]]
    written: list[str]
    labels: list[Any]
    texts: list[int]
    last: list[Any] | None = None
    next_words: list[str] | None = None
    counts: list[int] | None = None
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def last_words(self) -> list[str]:
        """The last word of each context, in lower case."""
        return [context[-1].lower() for context in self.contexts]

    @property
    def classes(self) -> list[Any]:
        """The distinct labels, sorted."""
        return ordered(self.labels)

    def take(self, rows: Sequence[int] | np.ndarray) -> Windows:
        """The windows of these numbers."""
        def of(values: Any) -> Any:
            return None if values is None else [values[n] for n in rows]

        lists = {f.name: of(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "left_out"}
        return dataclasses.replace(self, **lists)

    def sample(self, per_class: int, classes: Sequence[Any] | None = None, seed: int = 0) -> Windows:
        """As many windows of each class, drawn without replacement, in the order of the texts.

        Args:
            per_class: windows of each class.
            classes: which; None: all that have so many.
            seed: random seed of the draw.

        Raises:
            ValueError: a class has fewer windows, or fewer than two classes are left.
        """
        counts = Counter(self.labels)
        wanted = [c for c in self.classes if counts[c] >= per_class] if classes is None else list(classes)
        known = ", ".join(f"{c} {counts[c]}" for c in self.classes[:12])
        poor = [str(c) for c in wanted if counts[c] < per_class]
        if poor:
            raise ValueError(f"classes: expected {per_class} windows or more of each, got fewer of {', '.join(poor)}; "
                             f"there are {known}: lower per_class or give more text")
        if len(wanted) < 2:
            raise ValueError(f"expected two classes or more with {per_class} windows each, got {len(wanted)}; there "
                             f"are {known or 'none'}: lower per_class, or give more text or other labels")
        draw = np.random.default_rng(seed)
        of = {c: np.array([n for n, label in enumerate(self.labels) if label == c]) for c in wanted}
        return self.take(np.sort(np.concatenate([draw.choice(of[c], per_class, replace=False) for c in wanted])))


def windows(texts: Sequence[Text], context: int = 9, stride: int = 1) -> Windows:
    """Every ``stride``-th window of ``context`` words and a next one, of each text by itself.

    Args:
        texts: running texts as (word, class) pairs, with the class that the word has where it stands; a third entry is
            the white space after the word, else words are joined as English is written.
        context: words read.
        stride: words from one window to the next.

    Raises:
        ValueError: something else than pairs, or no text long enough.
    """
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
        raise ValueError("data: expected tagged texts such as [[('the', 'DET'), ('dog', 'NOUN'), ...], ...], got "
                         f"{type(texts).__name__}")
    counts: Counter[str] = Counter()
    for n, text in enumerate(texts):
        bad = next((word for word in text if isinstance(word, str) or len(word) not in (2, 3)
                    or not isinstance(word[0], str) or not word[0].strip()), None)
        if isinstance(text, str) or bad is not None:
            got = repr(text)[:60] if isinstance(text, str) else repr(bad)
            raise ValueError(f"data: expected (word, class) pairs in text {n}, got {got}: for untagged texts pass "
                             "(texts, nlp) with a spaCy pipeline, for labels of your own (contexts, labels)")
        counts.update(word[0].lower() for word in text)
    found: dict[str, list[Any]] = {name: [] for name in (
        "contexts", "written", "labels", "texts", "last", "next_words", "counts")}
    left_out = {"punctuation comes next": 0, "the next word's class is unknown": 0,
                f"texts of fewer than {context + 1} words": 0}
    for n, text in enumerate(texts):
        left_out[f"texts of fewer than {context + 1} words"] += len(text) <= context
        for start in range(0, len(text) - context, stride):
            words, (next_word, label, *_) = text[start:start + context], text[start + context]
            if label is None or str(label) in UNKNOWN:
                left_out["the next word's class is unknown"] += 1
            elif str(label) in PUNCTUATION:
                left_out["punctuation comes next"] += 1
            else:
                row = (tuple(word[0] for word in words), joined(words), label, n, words[-1][1], next_word,
                       counts[next_word.lower()])
                for name, value in zip(found, row, strict=True):
                    found[name].append(value)
    if not found["labels"]:
        longest = max(map(len, texts), default=0)
        raise ValueError(f"data: expected texts of {context + 1} words or more with a class each, got {len(texts)} "
                         f"texts of at most {longest} words" + (": all next words are punctuation or unknown" if longest
                                                                > context else ": join sentences, or lower context"))
    return Windows(**found, left_out=left_out)


def joined(words: Sequence[Sequence[str]]) -> str:
    """Words of a text as they are written, without what follows the last one."""
    out = ""
    for n, (word, _, *space) in enumerate(words):
        following = words[n + 1][0] if n + 1 < len(words) else None
        tight = following is None or following in _NO_SPACE_BEFORE or word in _NO_SPACE_AFTER
        out += word + ("" if following is None else space[0] if space else "" if tight else " ")
    return out


def labelled(contexts: Sequence[str | Sequence[str]], labels: Sequence[Any], texts: Sequence[int] | None = None,
             ) -> Windows:
    """Windows of contexts with labels of one's own, such as genre, topic or construction.

    Args:
        contexts: texts, or their words.
        labels: one for each.
        texts: number of the text that each is from, for intervals; None: each is a text of its own.

    Raises:
        ValueError: not equally many, or an empty context.
    """
    if len(contexts) != len(labels) or (texts is not None and len(texts) != len(labels)):
        raise ValueError(f"labels: expected one for each of {len(contexts)} contexts, got {len(labels)}")
    words = [tuple(c.split()) if isinstance(c, str) else tuple(c) for c in contexts]
    if not all(words):
        raise ValueError(f"contexts: expected a text with a word or more, got an empty one, number {words.index(())}")
    written = [c.rstrip() if isinstance(c, str) else " ".join(c) for c in contexts]
    return Windows(words, written, list(labels), list(texts) if texts is not None else list(range(len(labels))))


def tagged(texts: Sequence[str], nlp: Callable[[str], Any]) -> list[list[tuple[str, str, str]]]:
    """Texts tagged by a spaCy pipeline: (word, universal class, white space after it); white space is no word.

    Raises:
        ValueError: the pipeline gives no classes.
    """
    out = [[(str(t.text), str(t.pos_), str(t.whitespace_)) for t in nlp(text) if not t.is_space] for text in texts]
    if out and not any(name for text in out for _, name, _ in text):
        raise ValueError("nlp: expected a pipeline that tags word classes, such as en_core_web_sm, got one that leaves "
                         "token.pos_ empty")
    return out


def read_tagged(text: str) -> list[list[tuple[str, str]]]:
    """Texts of a file of tagged words, ``the/DET dog/NOUN ...``, a text in each line.

    Raises:
        ValueError: a word without a class.
    """
    out = []
    for n, line in enumerate(files.lines(text), 1):
        pairs = [tuple(word.rsplit("/", 1)) for word in line.split()]
        bad = next((pair for pair in pairs if len(pair) != 2 or not pair[0]), None)
        if bad is not None:
            raise ValueError(f"line {n}: expected tagged words such as the/DET dog/NOUN, got {'/'.join(bad)!r}")
        if pairs:
            out.append([(word, name) for word, name in pairs])
    return out


def as_windows(data: Any, context: int = 9, stride: int = 1) -> Windows:
    """Windows of whatever :meth:`looseleaf_word_class.WordClassProbe.run` takes as data."""
    if isinstance(data, Windows):
        return data
    if isinstance(data, str):
        return windows(read_tagged(data), context, stride)
    if isinstance(data, tuple) and len(data) == 2:
        first, second = data
        if callable(second):
            return windows(tagged([first] if isinstance(first, str) else first, second), context, stride)
        if not len(second) or not isinstance(second[0], (tuple, list)):  # else two tagged texts
            return labelled(first, second)
    return windows(data, context, stride)


__all__ = ["PUNCTUATION", "UNKNOWN", "Text", "Windows", "as_windows", "joined", "labelled", "read_tagged", "tagged",
           "windows"]
