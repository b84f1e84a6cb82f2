"""Every claim of every paper in one table, taken from the tables of claims in the plugins' READMEs.

`python tools/claims.py` prints it; the page of the docs is made of it.
"""

from __future__ import annotations

import collections
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERDICTS = ("holds", "does not hold", "not shown", "not measured")


def rows(readme: str) -> list[tuple[str, str, str, str]]:
    """Claim, the paper's figure, what was measured, and the verdict, of each row of the tables of claims in a README.

    Such a table's first two headings are "claim" and "paper"; what was measured follows, and the verdict in the last
    column, which has no heading. Where there is no such column the verdict stands in the text.
    """
    found, inside, width = [], False, 0
    for line in readme.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        if cells[:2] == ["claim", "paper"]:
            inside, width = True, len(cells)
            with_verdict = not cells[-1]
        elif not line.startswith("|"):
            inside = False
        elif inside and len(cells) == width and set(line) - set("|-: "):
            text = cells[2:-1] if with_verdict else cells[2:]
            found.append((cells[0], cells[1], "; ".join(text), cells[-1] if with_verdict else ""))
    return found


def verdict(text: str) -> str:
    """The first of :data:`VERDICTS` that a row's last column names; "see text" where there is none."""
    at = {name: text.lower().find(name) for name in VERDICTS}
    named = [name for name in VERDICTS if at[name] >= 0]
    return min(named, key=lambda name: at[name]) if named else "see text"


def page(link: str = "../plugins") -> str:
    """The table in Markdown with its counts; ``link`` is the path to the plugins' folder."""
    counts: collections.Counter[str] = collections.Counter()
    lines = []
    for path in sorted(ROOT.glob("plugins/*/*/README.md")):
        kind, name = path.parent.parent.name, path.parent.name
        for claim, paper, measured, said in rows(path.read_text(encoding="utf-8")):
            counts[verdict(said or measured)] += 1
            lines.append(f"| [{name}]({link}/{kind}/{name}/) | {claim} | {paper} | {measured} | {said or 'see text'} |")
    summary = ", ".join(f"{counts[name]} {name}" for name in (*VERDICTS, "see text") if counts[name])
    return "\n".join([
        "# Claims", "", f"{len(lines)} claims of papers and of ours: {summary}. Each row is from the plugin's README, "
        "which says how it was measured, on how many seeds, in how many minutes; `looseleaf reproduce NAME` measures it"
        " again.",
        "", "| plugin | claim | paper | measured | verdict |", "|---|---|---|---|---|", *lines])


if __name__ == "__main__":
    print(page())
