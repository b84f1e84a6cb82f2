"""The main job on a real language model: methods of every kind, measured on SmolLM2-135M-Instruct and real text.

    nox -s demo                  everything, about ten minutes on two cores
    nox -s demo -- --quick       shorter contexts and searches

Prints tables as it goes and writes looseleaf-report.html (opens offline) and report.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import looseleaf
import looseleaf_text
from looseleaf import Report
from looseleaf.files import write_text

MODEL = "smollm2"


def installed(kind: str, *names: str) -> dict[str, Any]:
    """Name -> class of the installed plugins of a kind that can be loaded; with ``names``, of these only.

    The demo has a time to keep, so that its parts name what they take; `looseleaf compare` takes all that there is.
    """
    classes = {}
    for entry in looseleaf.plugins(kind):
        if names and entry.name not in names:
            continue
        try:
            classes[entry.name] = looseleaf.load(entry)
        except looseleaf.PluginError as error:  # one broken plugin must not stop the others
            print(f"left out: {error}", file=sys.stderr)
    return classes


def attention(model: Any, tokenizer: Any, quick: bool) -> Report:
    """An attention backend against dense attention."""
    from looseleaf_lab.benches import compare_attention

    contexts = (512, 1024, 1536) if quick else (2048, 4096, 8192)
    backends = {name: cls() for name, cls in installed("attention", "flexprefill").items()}
    return compare_attention(model, tokenizer, backends, contexts, rounds=1 if quick else 2, last=256, progress=True)


def pruning(model: Any, tokenizer: Any, quick: bool) -> Report:
    """One-shot pruning over a sweep of sparsities."""
    from looseleaf_lab.benches import compare_pruners

    sweep = (0.3, 0.6) if quick else (0.1, 0.3, 0.5, 0.7)
    pruners = installed("pruners", "essential-sparsity")
    return compare_pruners(model, tokenizer, pruners, sweep, windows=2 if quick else 4, published=False,
                           progress=True)


def prompting(model: Any, tokenizer: Any, quick: bool) -> Report:
    """Two prompt optimisers on a classification task, with equal budgets."""
    from looseleaf_lab import data
    from looseleaf_lab.benches import compare_prompts

    size = 16 if quick else 32
    task = data.classification_task("sentiment", 0, train=size, dev=size, test=2 * size)
    optimizers = {name: cls() for name, cls in installed("prompts", "promptquine", "tapruning").items()}
    return compare_prompts(looseleaf_text.LocalModel(model, tokenizer), optimizers, [task], calls=200 if quick else 600,
                           published=False, progress=True)


def steering(model: Any, tokenizer: Any, quick: bool) -> Report:
    """LinEAS steers the model."""
    from looseleaf_lab.benches import compare_probes

    probes = {}
    for name, cls in installed("probes", "lineas").items():
        shorter = {"steps": 5 if quick else 25} if any(p.name == "steps" for p in cls.parameter_info()) else {}
        probes[name] = cls(**shorter)
    return compare_probes({MODEL: (model, tokenizer)}, probes, progress=True)


PARTS: dict[str, tuple[str, Callable[[Any, Any, bool], Report]]] = {
    "attention": ("Attention backends against dense attention", attention),
    "pruners": ("Pruning over a sparsity sweep", pruning),
    "prompts": ("Prompt optimisation on a classification task", prompting),
    "probes": ("Steering the model", steering)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter contexts and searches")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--out", default=".", help="folder for looseleaf-report.html and report.json")
    options = parser.parse_args()
    out = Path(options.out)
    if not out.is_dir():
        parser.error(f"--out {out}: no such folder")

    from looseleaf_lab import html, models

    begin = time.perf_counter()
    print("loading SmolLM2-135M-Instruct (converted once, then cached)", flush=True)
    model, tokenizer = models.load(MODEL)
    reports: list[Report] = []
    for number, name in enumerate(options.only, 1):
        title, part = PARTS[name]
        print(f"\n[{number}/{len(options.only)}] {title}\n", flush=True)
        start = time.perf_counter()
        report = part(model, tokenizer, options.quick)
        report.title = title
        report.facts = {"seconds": round(time.perf_counter() - start, 1), **report.facts}
        reports.append(report)
        print(report.to_text(), flush=True)
        # Written after every part, so that an interrupted run leaves what it has.
        html.write(reports, out / "looseleaf-report.html", "Looseleaf on SmolLM2-135M-Instruct")
        write_text(out / "report.json", json.dumps([r.to_dict() for r in reports], indent=1) + "\n")
    print(f"\nwrote {out / 'looseleaf-report.html'} and {out / 'report.json'} "
          f"after {time.perf_counter() - begin:.0f} seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
