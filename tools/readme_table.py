"""The plugins of this project, from their metadata, wherever they are named.

README.md, the gallery of the docs, the core's papers.json and extras, and what looseleaf-papers depends on.
`python tools/readme_table.py` rewrites all of them; `--check` compares and exits with 1 on a difference.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomllib
from between_marks import rewrite, update

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- plugins: made by tools/readme_table.py -->", "<!-- end of plugins -->"
FIRST, LAST = "# papers: made by tools/readme_table.py", "# end of papers"
KINDS = ("attention", "pruners", "prompts", "probes")


def projects() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Kind, folder and ``[project]`` of each plugin."""
    for kind in KINDS:
        for path in sorted((ROOT / "plugins" / kind).glob("*/pyproject.toml")):
            yield kind, path.parent.name, tomllib.loads(path.read_text(encoding="utf-8"))["project"]


def table(link: str = "plugins") -> str:
    """The table in Markdown; ``link`` is the path to the plugins' folder."""
    lines = ["| plugin | kind | version | what it does | paper |", "|---|---|---|---|---|"]
    for kind, folder, project in projects():
        url = project.get("urls", {}).get("Paper", "")
        paper = f"[{url.rsplit('/', 1)[-1]}]({url})" if url else ""
        lines.append(f"| [`{project['name']}`]({link}/{kind}/{folder}/) | {kind} | {project['version']} | "
                     f"{project['description']} | {paper} |")
    return "\n".join(lines)


def papers() -> str:
    """What ``looseleaf list --available`` shows, by the names that users call plugins by."""
    rows = [{"plugin": name, "kind": kind, "package": project["name"], "what it does": project["description"],
             "paper": project.get("urls", {}).get("Paper")}
            for kind, _, project in projects() for name in project["entry-points"][f"looseleaf.{kind}"]]
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def main(argv: list[str]) -> int:
    """Rewrite or check all of them."""
    check, tool = "--check" in argv, Path(__file__).name
    names = [(project["name"], project["version"]) for _, _, project in projects()]
    extras = "\n".join(f'{name.removeprefix("looseleaf-")} = ["{name}"]' for name, _ in names)
    needs = "\n".join(f'  "{name}>={version}",' for name, version in names)
    return max(update(ROOT / "packages/looseleaf/src/looseleaf/papers.json", papers(), tool, check=check),
               rewrite(ROOT / "README.md", BEGIN, END, table(), tool, check=check),
               rewrite(ROOT / "packages/looseleaf/pyproject.toml", FIRST, LAST, extras, tool, check=check),
               rewrite(ROOT / "packages/looseleaf-papers/pyproject.toml", FIRST, LAST, needs, tool, check=check))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
