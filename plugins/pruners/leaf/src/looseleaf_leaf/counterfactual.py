"""Samples without their confounding spans, and pairs of both for training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from looseleaf_leaf.batch import IGNORED, checked

Span = tuple[int, int]
"""Tokens from (included) and to (excluded)."""

FILL = {"labels": IGNORED}
"""What padding holds where it is not zero."""


@dataclass
class Counterfactuals:
    """Samples with a confounding span removed.

    Attributes:
        batch: the samples, padded on the right; as the batch they come from, without ``teacher`` (the teacher reads the
            student's tokens from here on).
        source: (N,) int64, the row that each comes from.
        spans: what was removed from each, in tokens of the source row: one span, or all of them (collective pruning).
    """

    batch: dict[str, Tensor]
    source: Tensor
    spans: list[list[Span]]

    def __len__(self) -> int:
        return len(self.spans)

    def where(self, keep: Tensor) -> Counterfactuals:
        """Those with True in ``keep`` (N,)."""
        chosen = keep.bool().cpu()
        return Counterfactuals({k: v[chosen.to(v.device)] for k, v in self.batch.items()},
                               self.source[chosen.to(self.source.device)],
                               [s for s, k in zip(self.spans, chosen.tolist()) if k])


def runs(removed: Tensor) -> list[Span]:
    """The runs of True in ``removed`` (L,), in order: each as long as it can be, together all of them."""
    edges = torch.nn.functional.pad(removed.to(torch.int8), (1, 1)).diff()
    return list(zip((edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist(), strict=True))


def counterfactuals(batch: Mapping[str, Any], keep: Tensor, *, collective: bool = False) -> Counterfactuals:
    """One sample for each run of removed tokens; with ``collective`` one for each row, without all of its runs.

    Args:
        batch: see :data:`looseleaf_leaf.batch.KEYS`.
        keep: (B, L) bool, True = keep; ``masks["input_ids"]`` of a pruner.
        collective: the alternative to span pruning that the paper compares with [section 3.1].

    Raises:
        ValueError: bad batch, a mask of another shape, or one that removes what is not of the instruction.
    """
    full = checked(batch)
    if keep.dtype != torch.bool or keep.shape != full["input_ids"].shape:
        raise ValueError(f"the mask is {keep.dtype} of shape {tuple(keep.shape)}: allowed is bool of shape "
                         f"{tuple(full['input_ids'].shape)}, True = keep")
    if bool((~keep.to(full["instruction_mask"].device) & ~full["instruction_mask"]).any()):
        raise ValueError("the mask removes tokens that are not of the instruction: it belongs to another batch")
    tensors = {k: full[k] for k in full if k not in ("teacher", "response_mask")}
    tensors["attention_mask"] = tensors["attention_mask"].to(torch.int64)
    chosen: list[tuple[int, list[Span]]] = []
    for row in range(len(keep)):
        found = runs(~keep[row])
        chosen += [(row, found)] if collective and found else [(row, [span]) for span in found]
    device = full["input_ids"].device
    kept = []
    for row, spans in chosen:
        stays = full["attention_mask"][row].clone()
        for start, stop in spans:
            stays[start:stop] = False
        kept.append(stays.nonzero().flatten())
    width = max(map(len, kept), default=0)
    made = {}
    for key, value in tensors.items():
        out = torch.full((len(chosen), width, *value.shape[2:]), FILL.get(key, 0), dtype=value.dtype, device=device)
        for at, ((row, _), index) in enumerate(zip(chosen, kept)):
            out[at, :len(index)] = value[row, index]
        made[key] = out
    return Counterfactuals(made, torch.tensor([row for row, _ in chosen], dtype=torch.int64, device=device),
                           [spans for _, spans in chosen])


def training_pairs(batch: Mapping[str, Any], made: Counterfactuals) -> list[dict[str, list[int]]]:
    """The training set of :class:`looseleaf_leaf.LeaFTrainer`: each counterfactual beside the sample it comes from.

    A sample in which nothing was removed is its own counterfactual: both terms of the loss are then the same.

    Returns:
        Rows without padding: ``input_ids``, ``labels``, ``counterfactual_input_ids``, ``counterfactual_labels``; in the
        order of the samples.
    """
    full = checked(batch)

    def plain(source: Mapping[str, Tensor], row: int) -> tuple[list[int], list[int]]:
        real = source["attention_mask"][row].bool()
        return source["input_ids"][row][real].tolist(), source["labels"][row][real].tolist()

    out = []
    for row in range(len(full["input_ids"])):
        ids, labels = plain(full, row)
        mine = (made.source == row).nonzero().flatten().tolist()
        for other, marks in [plain(made.batch, at) for at in mine] or [(ids, labels)]:
            out.append({"input_ids": ids, "labels": labels, "counterfactual_input_ids": other,
                        "counterfactual_labels": marks})
    return out


@dataclass
class PairCollator:
    """Pads rows of :func:`training_pairs` on the right and stacks them, with the attention masks.

    Args:
        pad_token_id: fills ``input_ids``; any id will do, for padding is not attended to.
    """

    pad_token_id: int = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Tensors (B, L) for the samples and (B, L') under names with ``counterfactual_`` before them."""
        out = {}
        for prefix in ("", "counterfactual_"):
            if prefix + "input_ids" not in rows[0]:
                continue
            ids = [torch.as_tensor(row[prefix + "input_ids"]) for row in rows]
            labels = [torch.as_tensor(row[prefix + "labels"]) for row in rows]
            pad = torch.nn.utils.rnn.pad_sequence
            out[prefix + "input_ids"] = pad(ids, batch_first=True, padding_value=self.pad_token_id)
            out[prefix + "labels"] = pad(labels, batch_first=True, padding_value=IGNORED)
            out[prefix + "attention_mask"] = pad([torch.ones_like(i) for i in ids], batch_first=True)
        return out
