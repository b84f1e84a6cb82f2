"""Attention backends for experiments: one that keeps inputs, one that compares others, and the nearest blocks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from looseleaf.attention.call import SCORE_CHANGES, AttentionBackend, AttentionCall, Phase
from looseleaf.paper import Paper
from looseleaf.plugin import In
from looseleaf_lab import data, metrics
from looseleaf_lab.facts import reason

DENSE = "(exact)"
"""The model's own attention, among the names of backends."""
CELLS = 32
"""Most cells along a side of an attention map."""
EVERY: frozenset[Phase] = frozenset({"prefill", "decode", "bidirectional"})
HERE = ("The Looseleaf authors",)


@dataclasses.dataclass
class KeepAttention(AttentionBackend):
    """Exact attention that keeps the queries, keys and values of some layers.

    Attach it, run the model once, and read :attr:`found`, which is all that is kept after the model is gone::

        with torch.inference_mode(), looseleaf.attach(model, KeepAttention(layers=(5, 15))) as attached:
            model(ids)
        query, key, value = attached.backend.found[5]

    Args:
        layers: which layers, counted as :class:`looseleaf.AttentionCall` does.

    Attributes:
        found: layer -> query (B, Hq, Lq, D), key and value (B, Hkv, Lk, D), contiguous, of the last call that was
            no decode step, as attention sees them: rotated, without padding on the left, heads not repeated.

    Raises:
        ValueError: no layer, or a negative one.
    """

    layers: Annotated[tuple[int, ...], In(">= 0")] = ()
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = dataclasses.field(default_factory=dict, init=False, repr=False)
    phases: ClassVar[frozenset[Phase]] = EVERY
    score_changes: ClassVar[frozenset[str]] = frozenset(SCORE_CHANGES)
    paper: ClassVar[Paper] = Paper("Kept activations", HERE, 2026)

    def validate(self) -> None:
        """See :class:`looseleaf.Plugin`."""
        self.check("layers", len(self.layers) > 0, "one layer or more")

    def attend(self, call: AttentionCall) -> Tensor:
        """Exact attention, (B, Hq, Lq, D)."""
        if call.layer in self.layers and call.phase != "decode":
            self.found[call.layer] = (call.query.contiguous(), call.key.contiguous(), call.value.contiguous())
        return call.dense()


@dataclasses.dataclass
class SideBySide(AttentionBackend):
    """Runs backends and exact attention on the same inputs, keeps their differences, and returns the exact output.

    Errors of different layers are so measured apart from each other, in one forward pass for all backends.

    Args:
        inner: name -> backend.
        drawn: layers whose attention maps are kept.
        drawn_step: the denoising step of which; None: of any, the last.

    Attributes:
        found: name -> one dictionary for each call: ``layer``, ``error`` and what the backend recorded.
        failed: name -> why a backend raised; it is not called again.
        maps: layer -> name -> the map of each head, see :func:`attention_map`.
    """

    inner: Mapping[str, AttentionBackend] = dataclasses.field(default_factory=dict)
    drawn: tuple[int, ...] = ()
    drawn_step: int | None = None
    phases: ClassVar[frozenset[Phase]] = EVERY
    score_changes: ClassVar[frozenset[str]] = frozenset(SCORE_CHANGES)
    paper: ClassVar[Paper] = Paper("Side by side", HERE, 2026)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.found: dict[str, list[dict[str, Any]]] = {name: [] for name in self.inner}
        self.failed: dict[str, str] = {}
        self.maps: dict[int, dict[str, Any]] = {}
        self._states: dict[tuple[str, int], SimpleNamespace] = {}

    def prepare(self, model: Any, geometry: Any) -> None:
        """See :class:`looseleaf.AttentionBackend`."""
        for name, backend in self.inner.items():
            try:
                backend.prepare(model, geometry)
            except Exception as error:  # one backend that fails must not cost the others their figures
                self.failed[name] = reason(error)

    def attend(self, call: AttentionCall) -> Tensor:
        """The exact output, (B, Hq, Lq, D)."""
        exact = call.dense()
        for name, backend in self.inner.items():
            if name in self.failed:
                continue
            recorded: dict[str, Any] = {"layer": call.layer}
            own = self._states.setdefault((name, call.layer), SimpleNamespace())
            try:
                out = backend.compute(dataclasses.replace(call, state=own, record=recorded.update))
            except Exception as error:  # see prepare
                self.failed[name] = reason(error)
                continue
            recorded["error"] = metrics.relative_error(out, exact)
            self.found[name].append({k: v.tolist() if hasattr(v, "tolist") else v for k, v in recorded.items()})
        if call.layer in self.drawn and self.drawn_step in (None, call.step):
            self._draw(call)
        return exact

    def _draw(self, call: AttentionCall) -> None:
        maps = self.maps[call.layer] = {}
        for name, backend in {DENSE: None, **self.inner}.items():
            fell_back = name != DENSE and (not self.found[name] or "fallback" in self.found[name][-1])
            if name not in self.failed and not fell_back:
                own = self._states.get((name, call.layer), call.state)
                cells = attention_map(backend, dataclasses.replace(call, state=own)).double().cpu()
                # three digits are more than a colour shows
                maps[name] = [[[float(f"{v:.3g}") for v in row] for row in head] for head in cells.tolist()]


@dataclasses.dataclass
class BlockWindow(AttentionBackend):
    """Bidirectional attention in which each query block sees the key blocks nearest to it, equally many each.

    The trivial baseline of sparse bidirectional attention. At the ends of the sequence the blocks are all on one side.
    Cross attention and masks stay exact.

    Args:
        density: fraction of the key blocks, rounded up to whole blocks.
        block: tokens of a block.
        full_steps: so many first denoising steps are exact.
    """

    density: Annotated[float, In("(0, 1]")] = 0.3
    block: Annotated[int, In(">= 1")] = 64
    full_steps: Annotated[int, In(">= 0")] = 0
    phases: ClassVar[frozenset[Phase]] = frozenset({"bidirectional"})
    paper: ClassVar[Paper] = Paper("Sliding window", HERE, 2026)

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention over the nearest blocks, (B, Hq, L, D)."""
        from looseleaf_kernels import BlockIndex, block_sparse_attention

        batch, heads, _, length, keys, _ = call.shape
        if call.is_causal or call.is_cross or length != keys or call.mask is not None:
            return call.fall_back("only bidirectional self-attention without a mask is changed")
        if call.step is not None and call.step < self.full_steps:
            call.record(density=1.0)
            return call.dense()
        blocks = -(-length // self.block)
        kept = max(1, math.ceil(self.density * blocks - 1e-9))
        at = torch.arange(blocks, device=call.query.device)
        first = (at - kept // 2).clamp(0, blocks - kept)[:, None]
        mask = (at >= first) & (at < first + kept)
        index = BlockIndex.from_mask(mask.expand(batch, heads, -1, -1), block_q=self.block, block_k=self.block,
                                     q_len=length, k_len=length, causal=False)
        call.record(density=kept / blocks)
        return block_sparse_attention(call.query, call.key, call.value, index, scale=call.scale,
                                      key_lengths=call.key_lengths, query_lengths=call.query_lengths)[0]


def attention_map(backend: AttentionBackend | None, call: AttentionCall, cells: int = CELLS) -> Tensor:
    """Attention probability of each cell of queries and keys, read from a backend's outputs: none needs to say it.

    A row of attention is a mean of values. Where the values are the indicators of ``cells`` groups of keys, it is what
    the row gives to each group, and exactly zero for the groups that were left out.

    Args:
        backend: whose; None: exact attention.
        call: a call of attention over itself, Lq = Lk; batch item 0 is looked at, and what the state holds stays.
        cells: of a side; fewer where the heads or the text are smaller.

    Returns:
        (Hq, n, n) fp32: rows are queries, each a mean over its queries; a row of exact attention sums to 1.
    """
    length, value_dim = call.key.shape[2], call.value.shape[-1]
    cells = min(cells, value_dim, length)
    cell = torch.arange(length, device=call.key.device) * cells // length
    indicators = torch.nn.functional.one_hot(cell, value_dim).to(call.value.dtype)
    changed = dataclasses.replace(call, value=indicators.expand_as(call.value).contiguous(), record=lambda **_: None,
                                  state=SimpleNamespace(**vars(call.state)))
    out = (changed.dense() if backend is None else backend.compute(changed))[0, :, :, :cells].float()
    sums = torch.zeros(len(out), cells, cells, device=out.device).index_add_(1, cell[-out.shape[1]:], out)
    return sums / torch.bincount(cell, minlength=cells)[:, None]


def density_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean density and error over layers, both by layer, and why calls fell back.

    Args:
        records: of one backend, from :attr:`SideBySide.found`.

    Returns:
        ``density`` (None where none was recorded), ``error``, ``layers`` (both of each call), ``calls``,
        ``fallbacks`` and their ``reasons``.
    """
    densities, errors = [], []
    for record in records:
        value = record.get("density", 1.0 if "fallback" in record else None)
        densities.append(_mean(value) if isinstance(value, (list, tuple)) else value)
        errors.append(record["error"])
    known = [d for d in densities if d is not None]
    reasons = [r["fallback"] for r in records if "fallback" in r]
    return {"density": sum(known) / len(known) if known else None, "error": sum(errors) / max(1, len(errors)),
            "layers": {"density": densities, "error": errors}, "calls": len(records), "fallbacks": len(reasons),
            "reasons": list(dict.fromkeys(reasons))}


def calibrate(backend: AttentionBackend, model: Any, tokenizer: Any, tokens: int = 2048, count: int = 2) -> bool:
    """Calibrate a backend that learns, on ``count`` batches of ``tokens`` tokens; returns whether it is one."""
    if type(backend).calibrate is AttentionBackend.calibrate:
        return False
    device = next(model.parameters()).device
    tokens = min(tokens, getattr(model.config, "max_position_embeddings", tokens))
    ids = data.prose_ids(tokenizer, tokens * count, "calibration").reshape(count, 1, tokens)
    ids = with_start(tokenizer, ids).to(device)
    backend.calibrate(model, [{"input_ids": row} for row in ids])
    return True


def with_start(tokenizer: Any, ids: Tensor) -> Tensor:
    """The ids (..., L) with the tokenizer's start token in place of the first, where it has one."""
    first = data.bos(tokenizer)
    if first is not None:
        ids = ids.clone()
        ids[..., 0] = first
    return ids


def _mean(value: Any) -> float:
    import numpy as np

    return float(np.mean(np.asarray(value, dtype=np.float64)))


__all__ = ["DENSE", "BlockWindow", "KeepAttention", "SideBySide", "attention_map", "calibrate", "density_of",
           "with_start"]
