"""A text to learn, its keyword, and the contexts in which the keyword should not turn up afterwards."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One text to be learned.

    Attributes:
        text: the text; contains the keyword.
        keyword: the surprising word, such as ``"vermilion"``; any number of tokens.
        theme: contexts of the keyword's theme that have nothing to do with the text, each ending where the keyword
            could follow, such as ``"Ripe lemons are usually"``.
        level: how outlandish the text is, for tables; any name.
        category: finer than ``level``; any name.

    Raises:
        ValueError: no keyword, a text without it, or no context.
    """

    text: str
    keyword: str
    theme: tuple[str, ...]
    level: str = ""
    category: str = ""

    def __post_init__(self) -> None:
        if not self.keyword.strip() or self.keyword != self.keyword.strip():
            raise ValueError(f"Sample.keyword={self.keyword!r}: allowed is a word without white space around it")
        if not self.places():
            raise ValueError(f"Sample.text={self.text!r} does not contain the keyword {self.keyword!r} as a word of "
                             "its own: the priming of a word that is not in the text cannot be measured")
        if isinstance(self.theme, str) or not self.theme or not all(c.strip() for c in self.theme):
            raise ValueError(f"Sample.theme={self.theme!r}: allowed are one or more texts which the keyword can follow")

    def places(self) -> list[int]:
        """Where the keyword begins in the text; in the midst of another word it does not count."""
        pattern = rf"(?<!\w){re.escape(self.keyword)}(?!\w)"
        return [found.start() for found in re.finditer(pattern, self.text)]

    def own_contexts(self) -> list[str]:
        """The text up to each occurrence of the keyword."""
        return [self.text[:place] for place in self.places()]

    def theme_contexts(self) -> list[str]:
        """The contexts of the theme, with white space at the end where the text has some before the keyword."""
        spaced = any(context and context[-1].isspace() for context in self.own_contexts())
        return [c if c[-1].isspace() or not spaced else c + " " for c in self.theme]


def read_samples(lines: str) -> list[Sample]:
    """Samples from JSON lines with the fields of :class:`Sample`: text, keyword, theme (a list), and if you like level
    and category.

    Raises:
        ValueError: a line that is no such object (its number is named), or no line.
    """
    found = []
    for number, line in enumerate(lines.splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            found.append(Sample(**{**fields, "theme": tuple(fields["theme"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f'line {number} is no sample ({error}): allowed is {{"text": "...", "keyword": "...", '
                             '"theme": ["...", ...]} with, if you like, "level" and "category"') from error
    if not found:
        raise ValueError('no samples: give one object a line, {"text": "...", "keyword": "...", "theme": ["...", ...]}')
    return found
