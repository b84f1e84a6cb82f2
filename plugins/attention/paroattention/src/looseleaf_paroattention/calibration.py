"""Calibration: exact runs of the model under an observer, then the best order and the blocks of each head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from looseleaf import AttentionBackend, AttentionCall, Paper
from looseleaf.progress import bar
from looseleaf_paroattention.backend import PAROAttention
from looseleaf_paroattention.masks import block_masks
from looseleaf_paroattention.metrics import block_statistics, scores, sparsity
from looseleaf_paroattention.permutations import distinct, permute
from looseleaf_paroattention.plan import LayerPlan, Plan


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


def observe(plugin: PAROAttention, model: Any, batches: Iterable[Any] | Callable[..., Any], *,
            steps: int | None = None, progress: bool | None = None) -> dict[int, LayerStatistics]:
    """Run the model exactly and gather the statistics of each layer; arguments as in :meth:`PAROAttention.calibrate`.

    Raises:
        ValueError: no layer was seen that the method is for.
    """
    from looseleaf import attach

    observer = Observer(plugin)
    was_training = isinstance(model, nn.Module) and model.training
    if was_training:
        model.eval()
    try:
        with torch.no_grad(), attach(model, observer, steps=steps) as attached, \
                bar("observing attention", show=progress) as observer.bar:
            if callable(batches):
                batches(attached)
            else:
                for batch in [batches] if isinstance(batches, Mapping) else batches:
                    model(**batch)
    finally:
        if was_training:
            model.train()
    if not observer.found:
        raise ValueError(f"no self-attention was observed (exact calls: {sorted(set(observer.passed)) or 'none'}): "
                         "allowed is a model with attention over a grid of tokens, without mask or causality, run for "
                         f"more than dense_steps={plugin.dense_steps} steps")
    return observer.found


def make_plan(plugin: PAROAttention, statistics: Mapping[int, LayerStatistics]) -> Plan:
    """Orders and masks by the plugin's ``permutations``, ``alpha``, ``density`` and ``threshold``.

    Raises:
        ValueError: a step group was never seen, or a permutation that was given was not observed.
    """
    layers = {}
    for number, layer in sorted(statistics.items()):
        if not bool((layer.samples > 0).all()):
            missing = [g for g, n in enumerate(layer.samples.tolist()) if not n]
            raise ValueError(f"layer {number}: no step of group {missing} was observed, with step_groups="
                             f"{plugin.step_groups}: calibrate with whole runs of the sampler")
        heads = layer.sparse.shape[1]
        sparse, incoherent = (x / layer.samples.sum() for x in (layer.sparse, layer.incoherent))
        names = plugin.given_permutations(number, heads)
        if names is None:
            best = scores(sparse, incoherent, plugin.alpha).argmax(0)
            names = tuple(layer.names[p] for p in best.tolist())
        absent = sorted(set(names) - set(layer.names))
        if absent:
            raise ValueError(f"layer {number}: {', '.join(absent)} was not observed, {', '.join(layer.names)} were: "
                             "observe with the same permutations")
        chosen = [layer.names.index(name) for name in names]
        mass = layer.mass[:, chosen, range(heads)] / layer.samples[:, None, None, None]
        layers[number] = LayerPlan(
            names, block_masks(mass, density=plugin.density, threshold=plugin.threshold),
            dict(zip(layer.names, sparse.tolist(), strict=True)),
            dict(zip(layer.names, incoherent.tolist(), strict=True)))
    return Plan(plugin.settings(), layers)


@dataclasses.dataclass
class Observer(AttentionBackend):
    """Exact attention that gathers what the orders of the tokens would give.

    Args:
        plugin: whose grid, blocks and steps count.
    """

    plugin: PAROAttention = dataclasses.field(default_factory=PAROAttention)
    paper: ClassVar[Paper] = PAROAttention.paper

    def __post_init__(self) -> None:
        super().__post_init__()
        self.bar: Any = None
        self.found: dict[int, LayerStatistics] = {}
        self.passed: list[str] = []

    def attend(self, call: AttentionCall) -> Tensor:
        """Exact attention, (B, Hq, Lq, D)."""
        reason = self.plugin.not_for(call)
        if reason is None:
            lengths = self.plugin.item_lengths(call)
            group = self.plugin.step_group(call)
            if group is None:
                reason = f"one of the first {self.plugin.dense_steps} steps"
            else:
                self._gather(call, group, lengths or (call.shape[3],) * len(call.query))
        if reason is not None:
            self.passed.append(reason)
        if self.bar is not None:
            self.bar.update()
        return call.dense()

    def _gather(self, call: AttentionCall, group: int, lengths: tuple[int, ...]) -> None:
        plugin = self.plugin
        _, heads, kv_heads, tokens, _, _ = call.shape
        layer = self.found.get(call.layer)
        if layer is None:
            blocks = -(-tokens // plugin.block)
            given = plugin.given_permutations(call.layer, heads)
            assert plugin.grid is not None
            names = distinct(plugin.grid) if given is None else tuple(dict.fromkeys(given))
            tried = len(names)
            layer = self.found[call.layer] = LayerStatistics(
                names, torch.zeros(plugin.step_groups, tried, heads, blocks, blocks),
                torch.zeros(tried, heads, dtype=torch.float64), torch.zeros(tried, heads, dtype=torch.float64),
                torch.zeros(plugin.step_groups))
        for item, length in enumerate(lengths):
            if not length:
                continue
            query, key = call.query[item:item + 1, :, :length], call.key[item:item + 1, :, :length]
            for p, name in enumerate(layer.names):
                order = plugin.orders([name], length, [length]).to(query.device)
                one, two = permute(query, order)[0], permute(key, order)[0]
                mass, incoherence = block_statistics(one, two.repeat_interleave(heads // kv_heads, 0), call.scale,
                                                     plugin.block)
                n = mass.shape[-1]
                layer.mass[group, p, :, :n, :n] += mass.cpu()
                layer.sparse[p] += sparsity(mass, plugin.eps).double().cpu()
                layer.incoherent[p] += incoherence.mean((1, 2)).double().cpu()
            layer.samples[group] += 1
