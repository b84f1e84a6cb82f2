"""MInference as an attention backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from looseleaf import AttentionBackend, AttentionCall, Paper
from looseleaf_kernels import Layout, block_mean, last_query_scores
from looseleaf_minference import config as config_
from looseleaf_minference.columns import attention
from looseleaf_minference.config import DEFAULT, NAMES, VERTICAL_SLASH, Assignment, Pattern
from looseleaf_minference.patterns import Keys, a_shape_blocks, block_sparse_blocks, vertical_slash

LEAST_COLUMNS, LEAST_DIAGONALS = 30, 50
"""Columns and diagonals that a vertical-slash head has at least, whatever its configuration says."""


@dataclasses.dataclass
class MInference(AttentionBackend):
    """Causal prefill with one of three sparse patterns for each head, found once per model (arXiv 2407.02490).

    Decode steps, encoders, masks of the caller's own and short prompts are computed exactly.

    Args:
        last_q: how many of the last queries say which columns and diagonals matter; 1 or more.
        starting_layer: layers before this one are exact; 0 or more.
        config: the pattern of each head: a file of :meth:`save` or of the authors' code, or what such a file holds;
            None: 1000 columns and 6096 diagonals for all heads until :meth:`calibrate` or :meth:`load`.
        min_length: keys up to which attention is exact; 1 or more.
        block_size: tokens of a block: 16, 32, 64 or 128.
        forced_columns: so many first columns are always among the columns of a head; 0 or more.
        forced_offsets: so many nearest diagonals are always among the diagonals of a head; 1 or more.
    """

    last_q: int = 64
    starting_layer: int = 0
    config: Any = None
    min_length: int = 1024
    block_size: int = 64
    forced_columns: int = 30
    forced_offsets: int = 100
    paper: ClassVar[Paper] = Paper(
        title="MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
        authors=("Huiqiang Jiang", "Yucheng Li", "Chengruidong Zhang", "Qianhui Wu", "Xufang Luo", "Surin Ahn",
                 "Zhenhua Han", "Amir H. Abdi", "Dongsheng Li", "Chin-Yew Lin", "Yuqing Yang", "Lili Qiu"),
        year=2024, arxiv="2407.02490", venue="NeurIPS 2024", code="https://github.com/microsoft/MInference",
        summary="Shorter time to first token on long prompts; the pattern of each head is calibrated once.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.assignment: Assignment | None = None if self.config is None else config_.read(self.config)

    def validate(self) -> None:
        for field, least in (("last_q", 1), ("starting_layer", 0), ("min_length", 1), ("forced_columns", 0),
                             ("forced_offsets", 1)):
            value = getattr(self, field)
            self.check(field, isinstance(value, int) and value >= least, f"a whole number from {least}")
        self.check("block_size", self.block_size in (16, 32, 64, 128), "16, 32, 64 or 128")
        self.check("config", self.config is None or isinstance(self.config, (str, Path, Mapping, Sequence)),
                   "None, a path, or the content of a configuration file")

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention over the keys of each head's pattern, (B, Hq, Lq, D), in the dtype of the query.

        Raises:
            ValueError: the configuration is for another number of layers or heads.
        """
        if call.phase != "prefill" or not call.is_causal:
            return call.fall_back("only causal prefill is sparse")
        if call.mask is not None:
            return call.fall_back("a mask of the caller's own")
        layer = layer_of(call)
        if layer < self.starting_layer:
            return call.fall_back("a layer before starting_layer")
        patterns = self.patterns(call, layer)
        if call.shape[4] <= self.min_length or not call.shape[3]:
            return call.fall_back(f"no longer than {self.min_length} tokens")
        keys = self.select(call, patterns)
        density = keys.density()
        call.record(density=density.mean(), density_by_head=density.mean(0), **{
            f"{name}_heads": sum(p.name == name for p in patterns) / len(patterns) for name in NAMES})
        return attention(call.query, call.key, call.value, keys, call.scale)

    def patterns(self, call: AttentionCall, layer: int) -> list[Pattern]:
        """The pattern of each query head of a layer.

        Raises:
            ValueError: the configuration is for another number of layers or heads.
        """
        heads = call.shape[1]
        if self.assignment is None:
            return [DEFAULT] * heads
        layers = getattr(getattr(call.module, "config", None), "num_hidden_layers", None)
        found = len(self.assignment)
        if layers is not None and layers != found:
            raise ValueError(f"the configuration has {found} layers and the model {layers}: allowed is equally many. "
                             "Make one for this model with calibrate()")
        if layer >= found:
            raise ValueError(f"the configuration has {found} layers and the model calls layer {layer}: allowed is 0 to "
                             f"{found - 1}. Make one for this model with calibrate()")
        if len(self.assignment[layer]) != heads:
            raise ValueError(f"layer {layer} of the configuration has {len(self.assignment[layer])} heads and that of "
                             f"the model {heads}: allowed is equally many. Make one for this model with calibrate()")
        return self.assignment[layer]

    def select(self, call: AttentionCall, patterns: Sequence[Pattern]) -> Keys:
        """What each query block of a causal call attends to.

        Args:
            call: the call.
            patterns: one for each query head.
        """
        sizes = torch.tensor([[p.first, p.second] for p in patterns], dtype=torch.int64, device=call.query.device)
        return self.select_sized(call, [p.name for p in patterns], *sizes.T[:, None].expand(-1, len(call.query), -1))

    def scores(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Attention of the last queries by key and by distance, (B, Hq, Lk) each, fp32."""
        return last_query_scores(call.query, call.key, self.last_q, scale=call.scale,
                                 query_lengths=call.query_lengths, key_lengths=call.key_lengths)

    def select_sized(self, call: AttentionCall, names: Sequence[str], first: Tensor, second: Tensor,
                     scores: tuple[Tensor, Tensor] | None = None) -> Keys:
        """As :meth:`select`, with the sizes of the patterns as tensors (B, Hq) int64.

        ``scores``: what :meth:`scores` gave, where it is at hand.
        """
        query, key = call.query, call.key
        batch, heads, _, _, lk, _ = call.shape
        device = query.device
        layout = Layout.of(query, key, self.block_size, call.query_lengths, call.key_lengths)
        causal = layout.causal
        blocks = torch.zeros(batch, heads, layout.rows, layout.columns, dtype=torch.bool, device=device)
        columns = torch.zeros(batch, heads, lk, dtype=torch.bool, device=device)
        of = {name: [h for h, n in enumerate(names) if n == name] for name in NAMES}
        if chosen := of["a_shape"]:
            blocks[:, chosen] = a_shape_blocks(first[:, chosen], second[:, chosen], layout)
        if chosen := of["vertical_slash"]:
            vertical, slash = (s[:, chosen] for s in scores or self.scores(call))
            blocks[:, chosen], columns[:, chosen] = vertical_slash(
                vertical, slash, first[:, chosen].clamp(min=LEAST_COLUMNS),
                second[:, chosen].clamp(min=LEAST_DIAGONALS), layout, forced_columns=self.forced_columns,
                forced_offsets=self.forced_offsets)
        if chosen := of["block_sparse"]:
            made = block_sparse_blocks(block_mean(query, self.block_size, call.query_lengths),
                                       block_mean(key, self.block_size, call.key_lengths), first, layout)
            blocks[:, chosen] = made[:, chosen]
        # An item of a batch is as exact as it would be alone.
        short = (layout.key_lengths <= self.min_length)[:, None, None]
        return Keys(torch.where(short[..., None], causal, blocks), columns & ~short, layout)

    def calibrate(self, model: torch.nn.Module, batches: Iterable[Any], *,
                  candidates: Sequence[Pattern | tuple[str, int, int]] = VERTICAL_SLASH, match_flops: bool = True,
                  density: float | None = None, error: str = "relative_l2", progress: bool | None = None) -> None:
        """Find the pattern of each head (section 3.2, algorithm 1): run each candidate, keep the one nearest to dense.

        Args:
            model: a transformers decoder, or anything that :func:`looseleaf.attach` takes.
            batches: dicts of model inputs, or one, longer than ``min_length``; the paper takes one long text.
            candidates: patterns, or tuples (name, first, second): :data:`VERTICAL_SLASH`, as in the files that the
                authors publish, or :data:`CANDIDATES`, all three patterns of the paper.
            match_flops: first give all candidates of a head the same cost, counted in score elements of the kernels
                and of the estimation of the indices, by making their sizes larger or smaller; on the first batch.
            density: that cost, as a share of all causal blocks; None: the median cost of the candidates as given, and
                0.5 at most.
            error: ``relative_l2``, or ``count`` of output elements that differ by more than 5e-3, as one search of the
                authors' code has it.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            ValueError: no batch was long enough for this method, or an argument is out of range.
        """
        from looseleaf_minference.search import calibrate

        self.assignment = calibrate(self, model, batches, candidates, match_flops=match_flops, density=density,
                                    error=error, progress=progress)

    def save(self, path: str | Path) -> None:
        """Write the pattern of each head as JSON.

        Raises:
            ValueError: there is none yet.
        """
        if self.assignment is None:
            raise ValueError("there is no pattern to save: run calibrate() or load() first")
        config_.write(self.assignment, path)

    def load(self, path: str | Path) -> None:
        """Read what :meth:`save` wrote, or a file of the authors' code.

        Raises:
            ValueError: the first layer and head that cannot be read, and why.
        """
        self.assignment = config_.read(path)


def layer_of(call: AttentionCall) -> int:
    """The decoder layer of a call: what the module says, for models that have other attention modules as well."""
    found = getattr(call.module, "layer_idx", None)
    return call.layer if found is None else int(found)
