"""Calibration: exact runs of the model under an observer, then the best order and the blocks of each head.

How good an order is for a head is measured by sparsity and incoherence (paper, token reordering); which blocks are
computed is fixed once, from the attention they hold (paper, static sparse masks). The attention map is never held
whole: a few rows of blocks at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from looseleaf import AttentionBackend, AttentionCall, attach
from looseleaf.attention.call import Phase
from looseleaf.modes import evaluating
from looseleaf.progress import bar
from looseleaf_paroattention.grid import AXES, PERMUTATIONS, TokenGrid, distinct, grid_order, permute
from looseleaf_paroattention.plan import LayerPlan

ELEMENTS = 1 << 22
"""Scores held at a time, unless one row of blocks of all heads has more."""


@dataclasses.dataclass
class LayerStatistics:
    """Sums over the samples of one layer.

    Attributes:
        names: the permutations that were tried, P of them.
        mass: (step groups, P, H, N, N) fp32, on the CPU.
        sparse, incoherent: (P, H) fp64, M_s and M_q.
        samples: (step groups,) how many.
    """

    names: tuple[str, ...]
    mass: Tensor
    sparse: Tensor
    incoherent: Tensor
    samples: Tensor

    def mean_mass(self, name: str) -> Tensor:
        """(step groups, H, N, N): the mean attention in each block in one order."""
        return self.mass[:, self.names.index(name)] / self.samples[:, None, None, None]


def observe(model: Any, batches: Iterable[Any] | Callable[..., Any], grid: TokenGrid, *, block: int = 64,
            eps: float = 1e-3, steps: int | None = None, progress: bool | None = None) -> dict[int, LayerStatistics]:
    """Run the model exactly and gather the statistics of each layer.

    Args:
        model: a diffusers pipeline or model, or anything that :func:`looseleaf.attach` takes.
        batches: keyword arguments of the model or pipeline, in one dictionary or several; or a function that runs it,
            given what :func:`looseleaf.attach` returned.
        grid: which calls count, and what orders their tokens have.
        block: tokens of a block.
        eps: blocks with a smaller fraction of their rows' attention count as empty.
        steps: denoising steps of a run, where no pipeline reports them.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: no layer was seen that the method is for.
    """
    observer = Observer(grid, block, eps)
    with evaluating(model), torch.no_grad(), attach(model, observer, steps=steps) as attached, \
            bar("observing attention", show=progress) as observer.progress_bar:
        if callable(batches):
            batches(attached)
        else:
            for batch in [batches] if isinstance(batches, Mapping) else batches:
                model(**batch)
    if not observer.layers:
        raise ValueError(f"batches: expected self-attention over a grid of tokens, without mask or causality, for more "
                         f"than dense_steps={grid.dense_steps} steps, got none (exact calls: "
                         f"{sorted(set(observer.passed)) or 'none'})")
    return observer.layers


@dataclasses.dataclass
class Observer(AttentionBackend):
    """Exact attention that gathers what the orders of the tokens would give.

    Args:
        grid: which calls count, and what orders their tokens have.
        block: tokens of a block.
        eps: blocks with a smaller fraction of their rows' attention count as empty.
    """

    grid: TokenGrid
    block: int = 64
    eps: float = 1e-3
    phases: ClassVar[frozenset[Phase]] = frozenset({"prefill", "decode", "bidirectional"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.progress_bar: Any = None
        self.layers: dict[int, LayerStatistics] = {}
        self.passed: list[str] = []

    def attend(self, call: AttentionCall) -> Tensor:
        """Exact attention, (B, Hq, Lq, D)."""
        reason = self.grid.not_for(call)
        if reason is None:
            lengths = self.grid.item_lengths(call)
            group = self.grid.step_group(call)
            if group is None:
                reason = f"one of the first {self.grid.dense_steps} steps"
            else:
                self._gather(call, group, lengths or (call.shape[3],) * len(call.query))
        if reason is not None:
            self.passed.append(reason)
        if self.progress_bar is not None:
            self.progress_bar.update()
        return call.dense()

    def _gather(self, call: AttentionCall, group: int, lengths: tuple[int, ...]) -> None:
        _, heads, kv_heads, tokens, _, _ = call.shape
        layer = self.layers.get(call.layer)
        if layer is None:
            blocks = -(-tokens // self.block)
            requested = self.grid.requested(call.layer, heads)
            assert self.grid.size is not None
            names = distinct(self.grid.size) if requested is None else tuple(dict.fromkeys(requested))
            layer = self.layers[call.layer] = LayerStatistics(
                names, torch.zeros(self.grid.step_groups, len(names), heads, blocks, blocks),
                torch.zeros(len(names), heads, dtype=torch.float64),
                torch.zeros(len(names), heads, dtype=torch.float64), torch.zeros(self.grid.step_groups))
        for item, length in enumerate(lengths):
            if not length:
                continue
            query, key = call.query[item:item + 1, :, :length], call.key[item:item + 1, :, :length]
            for p, name in enumerate(layer.names):
                order = self.grid.orders([name], length, [length]).to(query.device)
                q, k = permute(query, order)[0], permute(key, order)[0]
                mass, incoherence = block_statistics(q, k.repeat_interleave(heads // kv_heads, 0), call.scale,
                                                     self.block)
                n = mass.shape[-1]
                layer.mass[group, p, :, :n, :n] += mass.cpu()
                layer.sparse[p] += sparsity(mass, self.eps).double().cpu()
                layer.incoherent[p] += incoherence.mean((1, 2)).double().cpu()
            layer.samples[group] += 1


def make_layers(statistics: Mapping[int, LayerStatistics], grid: TokenGrid, *, alpha: float = 0.5,
                density: float = 0.3, threshold: float | None = None) -> dict[int, LayerPlan]:
    """Orders and masks of each layer.

    Args:
        statistics: what :func:`observe` gathered.
        grid: with the permutations that were asked for.
        alpha: weight of the incoherence against the sparsity, 0 to 1.
        density, threshold: as in :func:`block_masks`.

    Raises:
        ValueError: a step group was never seen, or a permutation that was asked for was not observed.
    """
    layers = {}
    for number, layer in sorted(statistics.items()):
        if not bool((layer.samples > 0).all()):
            missing = [g for g, n in enumerate(layer.samples.tolist()) if not n]
            raise ValueError(f"layer {number}: expected steps of all {len(layer.samples)} groups of step_groups, got "
                             f"none of group {missing}. Calibrate with whole runs of the sampler")
        heads = layer.sparse.shape[1]
        sparse, incoherent = (x / layer.samples.sum() for x in (layer.sparse, layer.incoherent))
        names = grid.requested(number, heads)
        if names is None:
            best = scores(sparse, incoherent, alpha).argmax(0)
            names = tuple(layer.names[p] for p in best.tolist())
        absent = sorted(set(names) - set(layer.names))
        if absent:
            raise ValueError(f"layer {number}: expected one of the observed permutations {', '.join(layer.names)}, got "
                             f"{', '.join(absent)}. Observe with the same permutations")
        chosen = [layer.names.index(name) for name in names]
        mass = layer.mass[:, chosen, range(heads)] / layer.samples[:, None, None, None]
        layers[number] = LayerPlan(
            names, block_masks(mass, density=density, threshold=threshold),
            dict(zip(layer.names, sparse.tolist(), strict=True)),
            dict(zip(layer.names, incoherent.tolist(), strict=True)))
    return layers


def block_statistics(query: Tensor, key: Tensor, scale: float, block: int) -> tuple[Tensor, Tensor]:
    """What the attention map of one sample holds in each block.

    Args:
        query, key: (H, L, D), in the order that is to be judged; one token or more.
        scale: factor of the scores.
        block: tokens of a block; the last may be ragged.

    Returns:
        mass, (H, N, N) fp32: the fraction of the attention of a block's queries that falls on its keys, so that each
        row of blocks sums to 1 (the block's sum divided by its number of queries). Incoherence, (H, N, N) fp32: the
        largest probability of a block over their mean, 1 for a uniform or empty block.
    """
    heads, length, _ = query.shape
    count = -(-length // block)
    sizes = torch.full((count,), float(block), device=query.device)
    sizes[-1] = length - (count - 1) * block
    rows = max(1, ELEMENTS // (heads * length * block)) * block
    keys = key.float().transpose(1, 2)
    sums, tops = [], []
    for start in range(0, length, rows):
        p = torch.softmax((query[:, start:start + rows].float() @ keys) * scale, -1)
        n = -(-p.shape[1] // block)
        p = torch.nn.functional.pad(p, (0, count * block - length, 0, n * block - p.shape[1]))
        p = p.view(heads, n, block, count, block)
        sums.append(p.sum((2, 4)))
        tops.append(p.amax((2, 4)))
    total, top = torch.cat(sums, 1), torch.cat(tops, 1)
    elements = sizes[:, None] * sizes
    incoherence = torch.where(total > 0, top * elements / total, 1.0)
    return total / sizes[:, None], incoherence


def sparsity(mass: Tensor, eps: float) -> Tensor:
    """M_s, (...,): the fraction of the blocks (..., N, N) that hold less than ``eps`` of their rows' attention."""
    return (mass < eps).float().mean((-2, -1))


def scores(sparse: Tensor, incoherent: Tensor, alpha: float) -> Tensor:
    """The score of each permutation, the higher the better, (P, H).

    Each metric is divided by its sum over the permutations, so that what counts is by how large a part they differ.

    Args:
        sparse: M_s, (P, H), the higher the better.
        incoherent: M_q, the mean incoherence over the blocks, (P, H), the lower the better.
        alpha: weight of the second metric, 0 to 1.
    """
    fraction = sparse / sparse.sum(0).clamp(min=torch.finfo(torch.float32).tiny)
    return (1 - alpha) * fraction - alpha * incoherent / incoherent.sum(0)


def block_masks(mass: Tensor, *, density: float = 0.3, threshold: float | None = None) -> Tensor:
    """The blocks to keep; at least the best one of each row of blocks, so that every query sees something.

    Args:
        mass: (..., N, N), the mean over the calibration of the fraction of a row's attention in each block.
        density: fraction of all blocks of each head to keep, the heaviest ones.
        threshold: keep the blocks with at least this mass instead; None: by ``density``.

    Returns:
        (..., N, N) bool.
    """
    if not mass.numel():
        return torch.ones_like(mass, dtype=torch.bool)
    best = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, mass.argmax(-1, keepdim=True), True)
    if threshold is not None:
        return (mass >= threshold) | best
    blocks = mass.shape[-1] * mass.shape[-2]
    keep = max(mass.shape[-2], round(density * blocks))
    order = torch.sort(mass.masked_fill(best, torch.inf).flatten(-2), dim=-1, descending=True, stable=True).indices
    mask = torch.zeros(*mass.shape[:-2], blocks, dtype=torch.bool, device=mass.device)
    return mask.scatter_(-1, order[..., :keep], True).view_as(mass)


# ------------------------------------------------------------- heads whose order is known, which calibration must find
STRENGTH = 14.0
"""Score of the pairs that a planted head attends to; the others have about 0."""
CODE, NOISE = 240, 16
"""Channels that say where a token is, and channels of noise."""


def planted(grid: Sequence[int], seed: int = 0,
            names: Sequence[str] = PERMUTATIONS) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, (1, H, L, 256) fp32, for a scale of 1; one head for each name.

    A head named ``abc`` attends to all tokens with its own place on axis a, its own or the next one on axis b, and any
    place on axis c: what it needs is one run of tokens in the order ``abc``, and several runs in the others. Noise
    with a standard deviation of 1 is on all scores, and random codes of the places add about as much.

    Args:
        grid: (F, H, W).
        seed: of codes, noise and values.
        names: permutations.
    """
    g = torch.Generator().manual_seed(seed)
    length = math.prod(grid)
    at = _places(grid)
    query, key = torch.zeros(1, len(names), length, CODE), torch.zeros(1, len(names), length, CODE)
    for h, name in enumerate(names):
        a, b = AXES.index(name[0]), AXES.index(name[1])
        codes = torch.nn.functional.normalize(torch.randn(grid[a], grid[b], CODE, generator=g), dim=-1)
        near = _near(grid[b])
        query[0, h] = STRENGTH * (near @ codes)[at[a], at[b]]
        key[0, h] = codes[at[a], at[b]]
    noise = torch.randn(2, 1, len(names), length, NOISE, generator=g) * NOISE ** -0.25
    value = torch.randn(1, len(names), length, CODE + NOISE, generator=g)
    return torch.cat([query, noise[0]], -1), torch.cat([key, noise[1]], -1), value


def expected_mass(name: str, order: str, grid: Sequence[int], block: int) -> Tensor:
    """(N, N): the block masses of a planted head without noise, in an order; L must divide into blocks."""
    at = _places(grid)
    a, b = AXES.index(name[0]), AXES.index(name[1])
    pairs = (at[a][:, None] == at[a]) & _near(grid[b]).bool()[at[b]][:, at[b]]
    places = grid_order(order, grid)
    attention = pairs[places][:, places].float()
    count = len(places) // block
    return (attention / attention.sum(-1, keepdim=True)).view(count, block, count, block).sum((1, 3)) / block


def density_for(mass: Tensor, fraction: float) -> Tensor:
    """The smallest part of the blocks that holds this fraction of the attention, (...,); ``mass`` (..., N, N)."""
    flat = mass.flatten(-2).double().sort(-1, descending=True).values
    held = flat.cumsum(-1)
    return ((held < fraction * held[..., -1:]).sum(-1) + 1) / flat.shape[-1]


def _places(grid: Sequence[int]) -> Tensor:
    """(3, L) int64: frame, row and column of each token."""
    return torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")).flatten(1)


def _near(size: int) -> Tensor:
    """(size, size): 1 for a place and the next ones on either side."""
    place = torch.arange(size)
    return ((place[:, None] - place).abs() <= 1).float()
