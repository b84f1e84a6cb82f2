"""Pages made from the code at build time: the gallery of papers and the API reference."""

from __future__ import annotations

import sys
from pathlib import Path

import mkdocs_gen_files

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import readme_table  # noqa: E402

with mkdocs_gen_files.open("gallery.md", "w") as page:
    print("# Papers\n\nMade from the packages' metadata; each page is the plugin's own README.\n", file=page)
    for line in readme_table.table().splitlines():
        print(line.replace("](plugins/", "](papers/").replace("/) |", ".md) |", 1), file=page)

for readme in sorted(ROOT.glob("plugins/*/*/README.md")):
    kind, name = readme.parent.parent.name, readme.parent.name
    with mkdocs_gen_files.open(f"papers/{kind}/{name}.md", "w") as page:
        page.write(readme.read_text(encoding="utf-8"))

MODULES = {
    "The core": ["looseleaf.plugin", "looseleaf.paper", "looseleaf.report", "looseleaf.discovery",
                 "looseleaf.attention.call", "looseleaf.attention.attach", "looseleaf.attention.window",
                 "looseleaf.pruning.pruner", "looseleaf.pruning.masks", "looseleaf.pruning.selection",
                 "looseleaf.pruning.targets", "looseleaf_tickets.iterative", "looseleaf_tickets.training",
                 "looseleaf_tickets.tickets", "looseleaf.pruning.knee", "looseleaf.pruning.semi_structured",
                 "looseleaf.prompts.optimizer", "looseleaf_text.task",
                 "looseleaf_text.prompt", "looseleaf.budget", "looseleaf_text.model",
                 "looseleaf_text.local", "looseleaf_text.endpoint", "looseleaf_text.masked",
                 "looseleaf_text.template", "looseleaf_text.verbalizer", "looseleaf_text.calibration",
                 "looseleaf.probes.probe", "looseleaf.probes.hooks", "looseleaf_text.layers",
                 "looseleaf_text.lens", "looseleaf_text.scaling", "looseleaf.files", "looseleaf.fingerprint",
                 "looseleaf.testing",
                 "looseleaf.errors"],
    "The kernels": ["looseleaf_kernels"],
    "The lab": ["looseleaf_lab.models", "looseleaf_lab.data", "looseleaf_lab.metrics", "looseleaf_lab.vision",
                "looseleaf_lab.compressed",
                "looseleaf_lab.compare",
                "looseleaf_lab.sweep", "looseleaf_lab.html"],
}
SOURCES = [ROOT / "packages/looseleaf/src", ROOT / "packages/looseleaf-lab/src", ROOT / "kernels/src"]


def exists(module: str) -> bool:
    """Whether the module has a source file."""
    part = module.replace(".", "/")
    return any((s / f"{part}.py").exists() or (s / part / "__init__.py").exists() for s in SOURCES)


with mkdocs_gen_files.open("api.md", "w") as page:
    print("# API reference\n", file=page)
    for title, modules in MODULES.items():
        print(f"## {title}\n", file=page)
        for module in modules:
            if exists(module):
                print(f"::: {module}\n", file=page)
