"""The table of plugins in README.md and the gallery of the docs, made from the packages' metadata.

`python tools/readme_table.py` rewrites README.md; `--check` only compares and exits with 1 on a difference.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tomllib
from between_marks import rewrite

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- plugins: made by tools/readme_table.py -->", "<!-- end of plugins -->"
KINDS = ("attention", "pruners", "prompts", "probes")


def table(link: str = "plugins") -> str:
    """The table in Markdown; ``link`` is the path to the plugins' folder."""
    lines = ["| plugin | kind | version | what it does | paper |", "|---|---|---|---|---|"]
    for kind in KINDS:
        for path in sorted((ROOT / "plugins" / kind).glob("*/pyproject.toml")):
            project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
            url = project.get("urls", {}).get("Paper", "")
            paper = f"[{url.rsplit('/', 1)[-1]}]({url})" if url else ""
            lines.append(f"| [`{project['name']}`]({link}/{kind}/{path.parent.name}/) | {kind} | "
                         f"{project['version']} | {project['description']} | {paper} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Rewrite or check README.md."""
    return rewrite(ROOT / "README.md", BEGIN, END, table(), Path(__file__).name, check="--check" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
