"""A part of a Markdown page that a tool writes, between two marks."""

from __future__ import annotations

from pathlib import Path


def rewrite(page: Path, begin: str, end: str, table: str, tool: str, *, check: bool) -> int:
    """Put ``table`` between the marks of ``page``, or with ``check`` only compare; 1 where the page is out of date."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(begin, 1)
    _, after = rest.split(end, 1)
    wanted = f"{before}{begin}\n{table}\n{end}{after}"
    if not check:
        page.write_text(wanted, encoding="utf-8")
    elif wanted != text:
        print(f"{page.name}: the table is out of date: run python tools/{tool}")
        return 1
    return 0
