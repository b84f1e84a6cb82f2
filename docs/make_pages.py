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

LIBRARIES = {"packages/looseleaf": "The core", "packages/looseleaf-text": "Language models and text prompts",
             "packages/looseleaf-vision": "Dual encoders and prompts for pictures",
             "packages/looseleaf-tickets": "Train, prune, rewind", "kernels": "The kernels",
             "packages/looseleaf-lab": "The lab"}
INNER = ("cli", "templates", "__main__")
START = """# Looseleaf

> Research papers as plugins for your own PyTorch and Hugging Face models: attention backends, pruners, prompt
> optimizers, probes.

Every page is also there as Markdown, under the same name with the ending .md.
"""


def families(folder: str) -> dict[str, list[str]]:
    """Part of a package -> its modules with something documented in them, those of the command line aside."""
    source = ROOT / folder / "src"
    found: dict[str, list[str]] = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        text = path.read_text(encoding="utf-8")
        if any(p in INNER or p.startswith("_") for p in parts) or ("\ndef " not in text and "\nclass " not in text):
            continue
        inside = (source / parts[0] / parts[1]).is_dir() if len(parts) > 1 else False
        found.setdefault(".".join(parts[:2] if inside else parts[:1]), []).append(".".join(parts))
    return found


with mkdocs_gen_files.open("api.md", "w") as index:
    print("# API reference\n", file=index)
    for folder, title in LIBRARIES.items():
        print(f"## {title}\n", file=index)
        for family, modules in families(folder).items():
            print(f"- [`{family}`](api/{family}.md): {', '.join(m.rpartition('.')[2] for m in modules)}", file=index)
            with mkdocs_gen_files.open(f"api/{family}.md", "w") as page:
                print(f"# {family}\n", file=page)
                for module in modules:
                    print(f"::: {module}\n", file=page)
        print(file=index)

with mkdocs_gen_files.open("llms.txt", "w") as page:
    print(START, "## Guides\n", sep="\n", file=page)
    for guide in ["index.md", *sorted(str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").glob("*/*.md")),
                  "architecture.md", "claims.md", "api.md"]:
        print(f"- [{guide.removesuffix('.md').rpartition('/')[2]}]({guide})", file=page)
    print("\n## Papers\n", file=page)
    for kind, folder, project in readme_table.projects():
        print(f"- [{project['name']}](papers/{kind}/{folder}.md): {project['description']}", file=page)
