"""The table of the core's public names and who uses each, in docs/architecture.md.

`python tools/public_names.py` rewrites the page; `--check` only compares and exits with 1 on a difference.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

import check_layout
from between_marks import rewrite

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- names: made by tools/public_names.py -->", "<!-- end of names -->"


def exported() -> dict[str, str]:
    """Names of ``looseleaf`` itself -> the module they live in, read without importing anything."""
    text = (ROOT / "packages/looseleaf/src/looseleaf/__init__.py").read_text(encoding="utf-8")
    block = text[text.index("_HOME = {"):text.index("}", text.index("_HOME = {"))]
    return {name: f"looseleaf.{home}" for name, home in re.findall(r'"(\w+)": "([\w.]+)"', block)}


def users() -> dict[tuple[str, str], set[str]]:
    """(module, name) of the core -> the distributions whose source imports it."""
    home, found = exported(), defaultdict(set)
    for package in check_layout.packages():
        if package.name == check_layout.CORE:
            continue
        for imports in package.imports.values():
            for each in imports:
                if each.module == "looseleaf" and each.name in home:
                    found[home[each.name], each.name].add(package.name)
                elif each.module.startswith("looseleaf.") and each.name:
                    found[each.module, each.name].add(package.name)
        for path in package.files.values():  # looseleaf.attach(...)
            for name in re.findall(r"\blooseleaf\.(\w+)\b", path.read_text(encoding="utf-8")):
                if name in home:
                    found[home[name], name].add(package.name)
    return found


def table() -> str:
    """The table in Markdown."""
    home, used = exported(), users()
    rows = {(module, name): who for (module, name), who in used.items()}
    for name, module in home.items():
        rows.setdefault((module, name), set())
    lines = ["| name | module | in `looseleaf` | used by |", "|---|---|---|---|"]
    for (module, name), who in sorted(rows.items()):
        short = sorted(w.removeprefix("looseleaf_").replace("_", "-") for w in who)
        shown = ", ".join(short[:6]) + (f" and {len(short) - 6} more" if len(short) > 6 else "")
        lines.append(f"| `{name}` | `{module}` | {'yes' if home.get(name) == module else ''} | "
                     f"{shown or 'users of the library'} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Rewrite or check the page."""
    return rewrite(PAGE, BEGIN, END, table(), Path(__file__).name, check="--check" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
