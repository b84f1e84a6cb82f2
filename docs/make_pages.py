"""Pages made from the code at build time: the gallery of papers and the API reference."""

from __future__ import annotations

import sys
from pathlib import Path

import mkdocs_gen_files

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import claims  # noqa: E402
import readme_table  # noqa: E402

with mkdocs_gen_files.open("gallery.md", "w") as page:
    print("# Papers\n\nMade from the packages' metadata; each page is the plugin's own README.\n", file=page)
    for line in readme_table.table().splitlines():
        print(line.replace("](plugins/", "](papers/").replace("/) |", ".md) |", 1), file=page)

for readme in sorted(ROOT.glob("plugins/*/*/README.md")):
    kind, name = readme.parent.parent.name, readme.parent.name
    with mkdocs_gen_files.open(f"papers/{kind}/{name}.md", "w") as page:
        page.write(readme.read_text(encoding="utf-8"))

with mkdocs_gen_files.open("claims.md", "w") as page:
    for line in claims.page("papers").splitlines():
        print(line.replace("/) |", ".md) |", 1), file=page)

LIBRARIES = {"The core": "packages/looseleaf", "Language models and text prompts": "packages/looseleaf-text",
             "Dual encoders and prompts for pictures": "packages/looseleaf-vision",
             "Train, prune, rewind": "packages/looseleaf-tickets", "The kernels": "kernels",
             "The lab": "packages/looseleaf-lab"}
INNER = ("cli", "templates", "__main__")


def public_modules(folder: str) -> list[str]:
    """Modules with something documented in them; those of the command line are not for import."""
    source = ROOT / folder / "src"
    found = []
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if any(p in INNER or p.startswith("_") for p in parts) or ("\ndef " not in path.read_text() \
                and "\nclass " not in path.read_text()):
            continue
        found.append(".".join(parts))
    return found


with mkdocs_gen_files.open("api.md", "w") as page:
    print("# API reference\n", file=page)
    for title, folder in LIBRARIES.items():
        print(f"## {title}\n", file=page)
        for module in public_modules(folder):
            print(f"::: {module}\n", file=page)
