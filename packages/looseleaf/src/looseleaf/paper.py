"""What is known about the paper behind a plugin."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A paper, as a plugin declares it.

    Attributes:
        title: full title.
        authors: family and given names, in the order of the paper.
        year: year of the version cited.
        arxiv: arXiv identifier such as ``"2502.20766"``, or None.
        venue: conference or journal, such as ``"ICLR 2025"``, or None.
        code: URL of the authors' own code, or None.
        summary: one line, in the user's words: what is it good for.
    """

    title: str
    authors: tuple[str, ...]
    year: int
    arxiv: str | None = None
    venue: str | None = None
    code: str | None = None
    summary: str = ""

    def __post_init__(self) -> None:
        if not self.title or not self.authors:
            raise ValueError("Paper needs a title and at least one author")
        if not 1900 <= self.year <= 2100:
            raise ValueError(f"Paper.year: expected a year in [1900, 2100], got {self.year!r}")

    @property
    def url(self) -> str | None:
        """Where to read the paper."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None

    def bibtex(self) -> str:
        """The BibTeX entry; its key is family name, year and first long word of the title."""
        word = next((w for w in self.title.lower().split() if len(w) > 3), "paper")
        key = f"{self.authors[0].split()[-1].lower()}{self.year}{''.join(filter(str.isalnum, word))}"
        fields = {"title": f"{{{self.title}}}", "author": " and ".join(self.authors), "year": self.year,
                  "booktitle": self.venue, "eprint": self.arxiv, "archivePrefix": self.arxiv and "arXiv",
                  "url": self.url}
        body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items() if value)
        return f"@{'inproceedings' if self.venue else 'misc'}{{{key},\n{body}\n}}"
