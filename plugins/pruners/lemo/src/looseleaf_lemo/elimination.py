"""Blocks of tokens: which of them an attention layer keeps, and its inputs and output cut to those."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf.errors import UnsupportedModelError
from looseleaf.modes import evaluating
from looseleaf_kernels import block_score_max, gather_rows, scatter_rows_add


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where the tokens of each item of a batch lie.

    Attributes:
        length: tokens of the batch, padding included.
        block: tokens of a block; the first block of an item begins at its first token, wherever padding puts that.
        valid: (B, L) bool, False for padding; None: there is none.
        start: (B,) place of the first token of each item; None: 0 for all.
        lengths: (B,) tokens from the first to the last, 0 for an item of padding alone; None: L for all.
    """

    length: int
    block: int
    valid: Tensor | None = None
    start: Tensor | None = None
    lengths: Tensor | None = None

    @property
    def blocks(self) -> int:
        """Blocks of the whole batch, the last one ragged."""
        return -(-self.length // self.block)

    def real(self, x: Tensor) -> Tensor:
        """(B, n) bool: which blocks have a token in them."""
        if self.lengths is None:
            return torch.ones(len(x), self.blocks, dtype=torch.bool, device=x.device)
        return torch.arange(self.blocks, device=x.device) * self.block < self.lengths[:, None]

    def short(self) -> Tensor | None:
        """(B,) bool: which items have less than two blocks of tokens and stay whole, as they would alone."""
        return None if self.lengths is None else self.lengths < 2 * self.block

    def aligned(self, x: Tensor) -> Tensor:
        """(B, n * block, H): items moved to the left, and room behind them up to whole blocks; what is there is not
        defined in items shorter than L, and zero behind L."""
        if self.start is not None:
            at = self.start[:, None] + torch.arange(self.length, device=x.device)
            x = _picked(x, at.clamp(max=self.length - 1))
        return F.pad(x, (0, 0, 0, self.blocks * self.block - self.length)) if self.length % self.block else x

    def blanked(self, x: Tensor) -> Tensor:
        """As :meth:`aligned`, with zeros for all padding."""
        if self.valid is not None:
            x = x.masked_fill(~self.valid[..., None], 0)
        x = self.aligned(x)
        if self.lengths is not None and self.start is not None:  # what clamping has doubled
            x = x.masked_fill((torch.arange(x.shape[1], device=x.device) >= self.lengths[:, None])[..., None], 0)
        return x

    def restored(self, x: Tensor) -> Tensor:
        """(B, L, H) of what :meth:`aligned` gave the places of; zeros before the first token of an item."""
        x = x[:, :self.length]
        if self.start is None:
            return x
        at = torch.arange(self.length, device=x.device) - self.start[:, None]
        return _picked(x, at.clamp(min=0)).masked_fill((at < 0)[..., None], 0)

    def tokens(self, blocks: Tensor) -> Tensor:
        """(B, K * block) int64, the tokens of blocks by their places in the batch; -1 where there is none."""
        at = blocks.long()[..., None] * self.block + torch.arange(self.block, device=blocks.device)
        at = torch.where(blocks[..., None] < 0, -self.length - 1, at).flatten(1)
        if self.start is not None:
            at = at + self.start[:, None]
        return torch.where((at < 0) | (at >= self.length), -1, at)

    def mask_of(self, blocks: Tensor) -> Tensor:
        """(B, L) bool, True for the tokens of blocks, padding left out."""
        at = self.tokens(blocks)
        out = torch.zeros(len(at), self.length + 1, dtype=torch.bool, device=at.device)
        out.scatter_(1, torch.where(at < 0, self.length, at), True)
        return out[:, :-1] if self.valid is None else out[:, :-1] & self.valid


def rows_of(x: Tensor, mask: Any, block: int) -> Rows:
    """The rows of a batch ``x`` (B, L, H), padding read off the attention mask of a layer: None, (B, L), or
    (B, heads, L, L) bool (True: seen) or additive, whose diagonal says whether a token sees itself."""
    batch, length = x.shape[:2]
    if mask is None:
        return Rows(length, block)
    own = mask if mask.ndim == 2 else mask[:, 0].diagonal(dim1=1, dim2=2)
    if own.is_floating_point() and mask.ndim == 4:
        own = own > torch.finfo(own.dtype).min / 2
    valid = own.bool().expand(batch, length)
    if bool(valid.all()):
        return Rows(length, block)
    places = torch.arange(length, device=x.device)
    start = torch.where(valid, places, length).amin(1)
    lengths = (torch.where(valid, places + 1, 0).amax(1) - start).clamp(min=0)
    start = start.masked_fill(lengths == 0, 0)
    return Rows(length, block, valid, start if bool(start.any()) else None, lengths)


def choose(scores: Tensor, real: Tensor, keep: float, threshold: float | None = None,
           whole: Tensor | None = None) -> Tensor:
    """(B, K) int32, the blocks that are kept, ascending; -1 behind them where an item keeps fewer than others.

    Args:
        scores: (B, n), high = informative. [section 4.1]
        real: (B, n) bool, blocks that have a token; no other is chosen. Ties: the earlier block.
        keep: fraction of the blocks of each item that is kept, ``round(keep * n)``, at least one [official code].
        threshold: instead, keep the blocks with at least this fraction of the largest score [paper].
        whole: (B,) bool, items of which all blocks are kept; None: of none.
    """
    count, n = real.sum(1), scores.shape[1]
    scores = scores.float().masked_fill(~real, -torch.inf)
    if threshold is None:
        wanted = (count * keep).round().long()
    else:
        wanted = ((scores >= threshold * scores.amax(1, keepdim=True)) & real).sum(1)
    wanted = torch.minimum(wanted.clamp(min=1), count)
    wanted = wanted if whole is None else torch.where(whole, count, wanted)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :int(wanted.max())]
    order = torch.where(torch.arange(order.shape[1], device=order.device) < wanted[:, None], order, n).sort(1).values
    return torch.where(order == n, -1, order).int()


def take(x: Tensor, rows: Rows, blocks: Tensor) -> Tensor:
    """(B, K * block, H): the rows of the kept blocks; a copy, so that what is saved of it does not keep ``x`` alive."""
    return gather_rows(rows.aligned(x), blocks, rows.block)


def put_back(y: Tensor, rows: Rows, blocks: Tensor) -> Tensor:
    """(B, L, H): the output of kept rows at their places, zeros elsewhere."""
    nothing = y.new_zeros(1).expand(len(y), rows.blocks * rows.block, y.shape[2])
    return rows.restored(scatter_rows_add(nothing, y, blocks, rows.block))


def cut_mask(mask: Tensor | None, rows: Rows, blocks: Tensor) -> Tensor | None:
    """The attention mask among kept tokens: of a mask (B, L) (B, K), of one (B, heads, L, L) (B, heads, K, K). A place
    without a token sees itself, so that no row of a softmax is empty, and is seen by none."""
    if mask is None:
        return None
    at = rows.tokens(blocks)
    there, at = at >= 0, at.clamp(min=0)
    if mask.ndim == 2:
        return mask.gather(1, at).masked_fill(~there, 0)
    mask = mask.expand(len(at), -1, -1, -1)
    items = torch.arange(len(at), device=at.device)[:, None, None]
    cut = mask[items, :, at[:, :, None], at[:, None, :]].permute(0, 3, 1, 2)
    yes, no = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    cut = cut.masked_fill(~there[:, None, None, :], no)
    own = torch.eye(at.shape[1], dtype=torch.bool, device=at.device) & ~there[:, None, :]
    return cut.masked_fill(own[:, None], yes)


def padding_only(mask: Tensor, valid: Tensor | None) -> bool:
    """Whether a boolean mask (B, 1, L, L) says no more than that attention is causal and padding is not seen: kept
    items lie at the left, so that causal attention needs no mask for it."""
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1:
        return False
    places = torch.arange(mask.shape[-1], device=mask.device)
    for b in range(len(mask)):  # item after item: L x L numbers at a time
        expected = places <= places[:, None]
        if valid is not None:
            expected = expected & valid[b]
            if not bool(torch.equal(mask[b, 0][valid[b]], expected[valid[b]])):
                return False
        elif not torch.equal(mask[b, 0], expected):
            return False
    return True


# ---------------------------------------------------------------------------------------------------- true scores
def projections(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (B, Hq, L, D) and keys (B, Hkv, L, D) of a layer before rotary embedding, norms of them included."""
    out = []
    for letter in ("q", "k"):
        linear = getattr(attention, f"{letter}_proj", None)
        if linear is None:
            raise UnsupportedModelError(f"{type(attention).__name__}: expected an attention with q_proj and k_proj, "
                                        f"got one without {letter}_proj: scores of blocks cannot be read off it")
        with evaluating(linear):  # without the dropout of an adapter
            flat = linear(x)
        norm = getattr(attention, f"{letter}_norm", None) or getattr(attention, f"{letter}_layernorm", None)
        weight = getattr(norm, "weight", None)
        whole = isinstance(weight, Tensor) and weight.numel() == flat.shape[-1]  # over all heads at once, as in OLMo 2
        if norm is not None and whole:
            flat = norm(flat)
        heads = flat.view(*x.shape[:2], -1, attention.head_dim)
        if norm is not None and not whole:
            heads = norm(heads)
        out.append(heads.transpose(1, 2))
    return out[0], out[1]


@torch.no_grad()
def pair_scores(attention: nn.Module, x: Tensor, rows: Rows, *, causal: bool = True,
                scale: float | None = None) -> Tensor:
    """(B, n, n) the largest score of each pair of blocks, positive scores of all heads added up. [section 4.1]

    Args:
        x: (B, L, H), what the attention is given.
        causal, scale: see :func:`looseleaf_kernels.block_score_max`.
    """
    query, key = projections(attention, rows.blanked(x))
    return block_score_max(query, key, rows.block, causal=causal, scale=scale, query_lengths=rows.lengths,
                           key_lengths=rows.lengths)


def block_scores(pairs: Tensor) -> Tensor:
    """(B, n): what a block gives to later ones, and what earlier ones give to it: the lower triangle is mirrored up
    and columns are summed. The diagonal counts once, as in the official code (the paper leaves it out)."""
    return (pairs + pairs.transpose(1, 2).triu(1)).sum(-2)


@torch.no_grad()
def true_scores(attention: nn.Module, x: Tensor, rows: Rows) -> Tensor:
    """(B, n) the informativeness of blocks, from a layer's own queries and keys."""
    return block_scores(pair_scores(attention, x, rows))


def _picked(x: Tensor, at: Tensor) -> Tensor:
    """Rows ``at`` (B, M) of ``x`` (B, L, H); only the numbers of the rows are saved for the backward."""
    at = at + torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, at.flatten()).view(*at.shape, x.shape[2])


__all__ = ["Rows", "block_scores", "choose", "cut_mask", "padding_only", "pair_scores", "projections", "put_back",
           "rows_of", "take", "true_scores"]
