"""The map of prompting methods, as data (survey, appendix; filled in from the methods' own papers)."""

from __future__ import annotations

import csv
import functools
from importlib import resources

from looseleaf import Table
from looseleaf.cli.listing import select

COLUMNS = {
    "name": "what the method is called",
    "cite": "citation key: first author, year of publication, first word of the title",
    "year": "year it was first public",
    "arxiv": "arXiv identifier",
    "task": "what it was tried on",
    "lm": "left-to-right, masked, encoder-decoder or vision-language",
    "shape": "where the answer goes: cloze (inside the prompt) or prefix (at its end)",
    "engineering": "how the prompt is found: manual; discrete by mining, paraphrasing, gradient search, edit search, "
                   "reinforcement learning, generation or scoring; continuous, with discrete initialisation or hybrid",
    "answer_shape": "token, span or sentence",
    "answers": "how the answers are found: manual, search (of discrete ones) or continuous",
    "tuning": "which parameters are trained: see looseleaf_prompting_survey.STRATEGIES",
    "multi_prompt": "ensembling, augmentation, composition, decomposition or sharing",
}
"""Column -> its meaning. A cell holds several values separated by ``"; "``, or none where we are not certain."""


def typology(**where: object) -> Table:
    """Prompting methods and their attributes, one a row; years 2018 to 2022.

    Args:
        where: column -> value that must be among the cell's, such as ``tuning="fixed-LM prompt tuning", year=2021``.

    Raises:
        ValueError: no such column, or a value that stands nowhere in it.
    """
    return select(Table("Prompting methods", list(COLUMNS), [list(row) for row in _rows()],
                        note="-: the method has none of it, or we are not certain"), where)


@functools.lru_cache(maxsize=1)
def _rows() -> tuple[tuple[str | int | None, ...], ...]:
    text = (resources.files("looseleaf_prompting_survey") / "typology.csv").read_text(encoding="utf-8")
    return tuple(tuple(int(row[name]) if name == "year" else row[name] or None for name in COLUMNS)
                 for row in csv.DictReader(text.splitlines()))
