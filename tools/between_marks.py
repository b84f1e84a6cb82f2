"""Files that a tool writes, and parts of a page between two marks."""

from __future__ import annotations

from pathlib import Path


def rewrite(page: Path, begin: str, end: str, table: str, tool: str, *, check: bool) -> int:
    """Put ``table`` between the marks of ``page``, or with ``check`` only compare; 1 where the page is out of date."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(begin, 1)
    _, after = rest.split(end, 1)
    return update(page, f"{before}{begin}\n{table}\n{end}{after}", tool, check=check)


def update(file: Path, wanted: str, tool: str, *, check: bool) -> int:
    """Write the whole of a file, or with ``check`` only compare; 1 where it is out of date."""
    if not check:
        file.write_text(wanted, encoding="utf-8")
    elif wanted != file.read_text(encoding="utf-8"):
        print(f"{file.name}: the table is out of date: run python tools/{tool}")
        return 1
    return 0
