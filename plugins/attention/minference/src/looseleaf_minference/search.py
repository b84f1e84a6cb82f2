"""The kernel-aware search for the pattern of each head (paper, section 3.2 and algorithm 1)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from looseleaf import AttentionBackend, AttentionCall, Paper
from looseleaf.progress import bar
from looseleaf_minference.backend import LEAST_COLUMNS, LEAST_DIAGONALS, MInference, layer_of
from looseleaf_minference.columns import attention
from looseleaf_minference.config import DEFAULT, Assignment, Pattern

ERRORS = ("relative_l2", "count")
DIFFERS = 5e-3
"""Output elements further than this from dense attention count as wrong, by ``error="count"``."""
HALVINGS = 12
LARGEST_FACTOR = 64.0
DENSEST = 0.5
"""The cost that candidates are given at most where the caller names none: on short texts most are dense."""
NOISE = 1e-5
"""Relative errors below this are rounding: the candidates are equal."""


def calibrate(plugin: MInference, model: torch.nn.Module, batches: Iterable[Any],
              candidates: Sequence[Pattern | tuple[str, int, int]], *, match_flops: bool, density: float | None,
              error: str, progress: bool | None, last: int | None = None) -> Assignment:
    """The pattern of each head; arguments as in :meth:`MInference.calibrate` and :class:`Search`."""
    from looseleaf import attach

    search = Search(plugin, candidates, match_flops=match_flops, density=density, error=error, last=last)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), attach(model, search) as attached:
            texts = [batches] if isinstance(batches, Mapping) else list(batches)
            body = getattr(model, "base_model", model)  # logits of a long text would fill the memory
            with bar("searching patterns", len(texts) * len(attached.chosen), progress) as search.bar:
                for text in texts:
                    body(**{**{k: v for k, v in text.items() if k != "labels"}, "use_cache": False})
    finally:
        model.train(was_training)
    return search.assignment(getattr(model.config, "num_hidden_layers", None) if hasattr(model, "config") else None)


@dataclasses.dataclass
class Search(AttentionBackend):
    """Exact attention that measures in passing how far each candidate is from it.

    Args:
        plugin: whose block size, ``last_q`` and forced indices are used.
        candidates: patterns, or tuples (name, first, second).
        match_flops: make the candidates of a head equally costly first.
        density: how costly; None: the median of the candidates as given, 0.5 at most.
        error: ``relative_l2`` or ``count``.
        last: only so many last queries of a text count; None: all of them, as in the paper.
    """

    plugin: MInference = dataclasses.field(default_factory=MInference)
    candidates: Sequence[Pattern | tuple[str, int, int]] = ()
    match_flops: bool = True
    density: float | None = None
    error: str = "relative_l2"
    last: int | None = None
    paper: ClassVar[Paper] = MInference.paper

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tried = [c if isinstance(c, Pattern) else Pattern(*c) for c in self.candidates]
        self.bar: Any = None
        self.sizes: dict[int, Tensor] = {}
        self.errors: dict[int, Tensor] = {}
        self.norms: dict[int, Tensor] = {}
        self._scores: tuple[Tensor, Tensor] | None = None

    def validate(self) -> None:
        self.check("candidates", len(self.candidates) > 0, "one pattern or more")
        self.check("density", self.density is None or 0 < self.density <= 1, "None, or a number above 0 and up to 1")
        self.check("error", self.error in ERRORS, " or ".join(ERRORS))
        self.check("last", self.last is None or (isinstance(self.last, int) and self.last >= 1), "None, or 1 or more")

    def attend(self, call: AttentionCall) -> Tensor:
        """Exact attention; the errors of the candidates go to :attr:`errors`."""
        out = call.dense()
        if self.bar is not None:
            self.bar.update()
        if call.phase != "prefill" or not call.is_causal or call.mask is not None \
                or call.shape[4] <= self.plugin.min_length:
            return out
        layer = layer_of(call)
        self._scores = self.plugin.scores(call)
        if layer not in self.sizes:
            self.sizes[layer] = self._sizes(call)
            self.errors[layer] = torch.zeros(len(self.tried), call.shape[1], dtype=torch.float64)
            self.norms[layer] = torch.zeros(call.shape[1], dtype=torch.float64)
        counts = self._counts(call)
        self.norms[layer] += (out.float() * counts).square().sum((0, 2, 3)).double().cpu()
        for number, pattern in enumerate(self.tried):
            twin = self._twin(layer, number)
            if twin is not None:
                self.errors[layer][number] = self.errors[layer][twin]
                continue
            keys = self._select(call, pattern, self.sizes[layer][number])
            gap = (attention(call.query, call.key, call.value, keys, call.scale).float() - out.float()) * counts
            wrong = gap.square().sum((0, 2, 3)) if self.error == "relative_l2" else (gap.abs() > DIFFERS).sum((0, 2, 3))
            self.errors[layer][number] += wrong.double().cpu()
        self._scores = None
        return out

    def assignment(self, layers: int | None = None) -> Assignment:
        """The candidate with the smallest error of each head, the first of equals.

        Layers that were never measured, such as those with a sliding window of their own, which stay exact, get the
        pattern of no search.

        Args:
            layers: of the model; None: as many as were seen.

        Raises:
            ValueError: no layer was measured.
        """
        if not self.sizes:
            raise ValueError(
                f"no layer was measured: allowed is batches longer than min_length={self.plugin.min_length} tokens, "
                "for a model with causal attention in some layer. Pass a longer text, or make min_length smaller")
        count = layers or max(self.sizes) + 1
        heads = next(iter(self.sizes.values())).shape[-1]
        made: Assignment = []
        for layer in range(count):
            if layer not in self.sizes:
                made.append([DEFAULT] * heads)
                continue
            errors = self.errors[layer]
            if self.error == "relative_l2":
                errors = (errors / self.norms[layer].clamp(min=1e-300)).sqrt()
            best = (errors.clamp(min=NOISE) if self.error == "relative_l2" else errors).argmin(0)
            sizes = self.sizes[layer].cpu()
            made.append([Pattern(self.tried[c].name, int(sizes[c, 0, h]), int(sizes[c, 1, h]), float(errors[c, h]))
                         for h, c in enumerate(best.tolist())])
        return made

    def _counts(self, call: AttentionCall) -> Tensor:
        """(B, 1, Lq, 1) bool: the queries whose error counts."""
        position = torch.arange(call.shape[3], device=call.query.device)[:, None]
        if self.last is None:
            return (position >= 0)[None, None]
        lengths = torch.tensor([call.shape[3]]) if call.query_lengths is None else call.query_lengths
        return position >= lengths.to(position.device)[:, None, None, None] - self.last

    def _twin(self, layer: int, number: int) -> int | None:
        """An earlier candidate that has become the same: on short texts the smallest sizes are taken by several."""
        return next((n for n in range(number) if self.tried[n].name == self.tried[number].name
                     and torch.equal(self.sizes[layer][n], self.sizes[layer][number])), None)

    def _select(self, call: AttentionCall, pattern: Pattern, sizes: Tensor) -> Any:
        wide = sizes[:, None].expand(-1, len(call.query), -1)
        return self.plugin.select_sized(call, [pattern.name] * call.shape[1], wide[0], wide[1], self._scores)

    def _sizes(self, call: AttentionCall) -> Tensor:
        """(candidates, 2, heads) int64: the sizes of each candidate, made equally costly if that is asked for."""
        heads = call.shape[1]
        given = [torch.tensor([[p.first], [p.second]], device=call.query.device).expand(2, heads) for p in self.tried]
        if not self.match_flops:
            return torch.stack(given)
        target = self.density
        if target is None:
            costs = [self._cost(call, p, s).mean() for p, s in zip(self.tried, given, strict=True)]
            target = min(float(torch.stack(costs).median()), DENSEST)
        return torch.stack([self._matched(call, p, s, target) for p, s in zip(self.tried, given, strict=True)])

    def _cost(self, call: AttentionCall, pattern: Pattern, sizes: Tensor) -> Tensor:
        """(heads,) score elements over those of all causal blocks, the estimation of the indices included."""
        keys = self._select(call, pattern, sizes)
        layout = keys.layout
        elements = layout.causal.sum((1, 2, 3)).float().mean().clamp(min=1) * layout.block ** 2
        estimated = {"a_shape": 0, "vertical_slash": min(self.plugin.last_q, layout.q_len) * layout.k_len,
                     "block_sparse": layout.rows * layout.columns}[pattern.name]
        cost: Tensor = keys.density().mean(0) + estimated / elements
        return cost

    def _matched(self, call: AttentionCall, pattern: Pattern, given: Tensor, target: float) -> Tensor:
        """The largest sizes, in the proportions of the candidate, that cost no more than ``target``, by bisection.

        Sinks stay as they are. Where even the smallest sizes cost more, those are taken.
        """
        low = torch.full((call.shape[1],), -math.log(LARGEST_FACTOR), device=given.device)
        high = -low
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            fits = self._cost(call, pattern, _scaled(pattern, given, middle.exp())) <= target
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        return _scaled(pattern, given, low.exp()).clamp(max=call.shape[4])


def _scaled(pattern: Pattern, given: Tensor, factor: Tensor) -> Tensor:
    made = (given * factor).round().long()
    if pattern.name == "vertical_slash":
        made = torch.stack([made[0].clamp(min=LEAST_COLUMNS), made[1].clamp(min=LEAST_DIAGONALS)])
    if pattern.name == "a_shape":
        made = torch.stack([given[0], made[1].clamp(min=1)])
    if pattern.name == "block_sparse":
        made = torch.stack([made[0].clamp(min=1), given[1]])
    return made
