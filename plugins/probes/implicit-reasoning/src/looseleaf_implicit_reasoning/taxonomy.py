"""The survey's map of silent reasoning, as data."""

from __future__ import annotations

import csv
import functools
from importlib import resources

from looseleaf import Table
from looseleaf.cli.listing import select

COLUMNS = {
    "name": "what the method, or the study, is called",
    "year": "year it was first public",
    "arxiv": "arXiv identifier",
    "paradigm": "latent optimization, signal-guided control, layer-recurrent execution, or evidence (a study of what "
                "models do inside)",
    "level": "what is optimised (token, trajectory, internal state), what guides (single-type or multi-type signal), "
             "or what the evidence is (structural, behavioural, representation)",
    "subtype": "of methods on trajectories: semantic anchoring, adaptive efficiency, progressive refinement, or "
               "exploratory",
    "part": "the name in looseleaf_implicit_reasoning that does it",
}
"""Column -> its meaning. A cell is empty where the survey makes no such division, or no part does it."""


def taxonomy(**where: object) -> Table:
    """Methods and studies of implicit reasoning with their place in the survey, one a row; 71 rows, 2022 to 2025.

    Args:
        where: column -> value, such as ``paradigm="evidence", year=2025``.

    Raises:
        ValueError: no such column, or a value that stands nowhere in it.
    """
    return select(Table("Implicit reasoning", list(COLUMNS), [list(row) for row in _rows()],
                        note="-: the survey makes no such division, or no part of this package does it"), where)


@functools.lru_cache(maxsize=1)
def _rows() -> tuple[tuple[str | int | None, ...], ...]:
    text = (resources.files("looseleaf_implicit_reasoning") / "taxonomy.csv").read_text(encoding="utf-8")
    return tuple(tuple(int(row[name]) if name == "year" else row[name] or None for name in COLUMNS)
                 for row in csv.DictReader(text.splitlines()))
