"""A sample as people look at it first: its tokens, how sensitive both models are to them, and what is removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from looseleaf import Report
from looseleaf_leaf.batch import checked
from looseleaf_leaf.pruner import LeaF


def show(pruner: LeaF, model: torch.nn.Module, batch: Mapping[str, Any], tokenizer: Any, *, rows: int = 8) -> Report:
    """The first samples of a batch as a report; ``looseleaf_lab.html.write`` makes a page of it.

    For each sample: its text with the instruction's tokens shaded by score (low is confounding) and the removed ones
    struck out, and these tokens in a table.

    Args:
        pruner: with its teacher.
        model: the student.
        batch: see :data:`looseleaf_leaf.batch.KEYS`.
        tokenizer: the student's, for the tokens' texts.
        rows: samples at most.

    Raises:
        ValueError: ``rows`` below 1; as :meth:`LeaF.score`.
    """
    if rows < 1:
        raise ValueError(f"rows={rows}: allowed is 1 or more")
    full = checked(batch)
    theirs, mine = pruner.sensitivities(model, batch)
    scores = pruner.score(model, batch)["input_ids"]
    masks = pruner.selection().select({"input_ids": scores})
    keep, free = masks["input_ids"], full["instruction_mask"]
    shown = min(rows, len(keep))
    report = Report("LeaF: what distracts the student", facts={
        "samples": len(keep), "shown": shown, "rule": pruner.selection().describe(),
        "removed tokens": masks.removed(), "removable tokens": int(scores.isfinite().sum())})
    for row in range(shown):
        ids = full["input_ids"][row].tolist()
        texts = [tokenizer.decode([token]) for token in ids]
        places = free[row].nonzero().flatten().tolist()
        difference = (theirs[row] - mine[row]).tolist()
        real = full["attention_mask"][row].nonzero().flatten().tolist()
        values = [difference[p] if bool(free[row, p]) else None for p in real]
        report.strip(f"sample {row}: teacher's minus student's sensitivity", [texts[p] for p in real], values,
                     [not bool(keep[row, p]) for p in real], "low: the student is led by it and the teacher is not")
        report.table(f"sample {row}: tokens", ["position", "token", "teacher", "student", "difference", "removed"],
                     [[p, texts[p], float(theirs[row, p]), float(mine[row, p]), difference[p], not bool(keep[row, p])]
                      for p in places])
    return report
