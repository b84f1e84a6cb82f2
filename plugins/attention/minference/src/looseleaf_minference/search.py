"""The kernel-aware search for the pattern of each head (paper, section 3.2 and algorithm 1), and a text for it."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from looseleaf import AttentionBackend, AttentionCall, attach
from looseleaf.modes import evaluating
from looseleaf.plugin import In
from looseleaf.progress import bar
from looseleaf_minference.patterns import (
    DEFAULT,
    LEAST_COLUMNS,
    LEAST_DIAGONALS,
    Keys,
    Pattern,
    Selector,
    layer_of,
)

Assignment = list[list[Pattern]]
"""``assignment[layer][head]``."""

CANDIDATES = (
    Pattern("a_shape", 100, 800), Pattern("vertical_slash", 30, 800), Pattern("vertical_slash", 100, 800),
    Pattern("vertical_slash", 100, 750), Pattern("vertical_slash", 500, 700), Pattern("vertical_slash", 3500, 100),
    Pattern("vertical_slash", 1000, 4096), Pattern("block_sparse", 100))
"""What the authors' search tries, all three patterns of the paper."""

VERTICAL_SLASH = tuple(p for p in CANDIDATES if p.name == "vertical_slash")
"""Those of them that are vertical-slash, the pattern of nearly all heads in the files that the authors publish.

The error of the search is that of all queries of a text. The few that look for something far away hardly count in it:
of equally costly patterns a window wins in heads that find things, and then the model no longer finds them. The indices
of a vertical-slash head come from the last queries, which write the answer, and make a window where the head is one.
The authors' search, too, turns every A-shape winner into a vertical-slash head; an early file of theirs, that of
Phi-3-mini, gives 43 of its 1,024 heads another pattern.
"""

DIFFERS = 5e-3
"""Output elements further than this from dense attention count as wrong, by ``error="count"``."""
HALVINGS = 12
LARGEST_FACTOR = 64.0
DENSEST = 0.5
"""The cost that candidates are given at most where the caller names none: on short texts most are dense."""
NOISE = 1e-5
"""Relative errors below this are rounding: the candidates are equal."""
SHORTEST_TEXT = 256
"""Tokens that hold a few pairs and the question."""


def key_value_ids(tokenizer: Any, length: int, seed: int = 0) -> Tensor:
    """A list of random keys and values, and the question for one that stands about a quarter of the way in.

    In such a text something far away is asked for: the paper calibrates on one sample of this task.

    Args:
        tokenizer: of transformers.
        length: tokens of the text, 256 or more: about as many as your prompts have.
        seed: of keys and values.

    Returns:
        (1, length) int64; it begins with the tokenizer's start token where it has one.

    Raises:
        ValueError: ``length`` is too small.
    """
    if length < SHORTEST_TEXT:
        raise ValueError(f"length: expected an integer >= {SHORTEST_TEXT}, got {length}. For MInference.calibrate take "
                         "more than its min_length")

    def ids(text: str) -> list[int]:
        encoded: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return encoded

    rng = random.Random(seed)
    start = getattr(tokenizer, "bos_token_id", None)
    text = [*([] if start is None else [start]), *ids("The keys and their values:\n")]
    question: list[int] = []
    while len(text) + len(question) < length:
        key, value = (f"{rng.getrandbits(32):08x}" for _ in range(2))
        text += ids(f'"{key}": "{value}"\n')
        if not question and len(text) >= length // 4:
            question = ids(f'\nThe value of the key "{key}" is "')
    return torch.tensor([text[:length - len(question)] + question], dtype=torch.int64)


def calibrate(selector: Selector, model: torch.nn.Module, batches: Iterable[Any],
              candidates: Sequence[Pattern | tuple[str, int, int]], *, match_flops: bool = True,
              density: float | None = None, error: str = "relative_l2", last: int | None = None,
              progress: bool | None = None) -> Assignment:
    """The pattern of each head of a model.

    Args:
        selector: how keys are selected.
        model: what :func:`looseleaf.attach` takes.
        batches: dicts of model inputs, or one.
        candidates, match_flops, density, error, last: see :class:`Search`.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: no batch was longer than ``selector.min_length``, or an argument is out of range.
    """
    search = Search(selector, candidates, match_flops, density, error, last)  # type: ignore[arg-type]
    texts = [batches] if isinstance(batches, Mapping) else list(batches)
    body = getattr(model, "base_model", model)  # logits of a long text would fill the memory
    with evaluating(model), torch.no_grad(), attach(model, search) as attached, \
            bar("searching patterns", len(texts) * len(attached.chosen), progress) as search.progress_bar:
        for text in texts:
            body(**{**{k: v for k, v in text.items() if k != "labels"}, "use_cache": False})
    return search.assignment(getattr(getattr(model, "config", None), "num_hidden_layers", None))


@dataclasses.dataclass
class Search(AttentionBackend):
    """Exact attention that measures in passing how far each candidate is from it.

    Args:
        selector: how keys are selected.
        candidates: patterns, or tuples (name, first, second).
        match_flops: make the candidates of a head equally costly first.
        density: how costly, as a fraction of causal attention; None: the median of the candidates as given, 0.5 at
            most.
        error: ``relative_l2`` or ``count``.
        last: only so many last queries of a text count; None: all of them, as in the paper.
    """

    selector: Selector
    candidates: Sequence[Pattern | tuple[str, int, int]]
    match_flops: bool = True
    density: Annotated[float | None, In("(0, 1]")] = None
    error: Literal["relative_l2", "count"] = "relative_l2"
    last: Annotated[int | None, In(">= 1")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tried = [c if isinstance(c, Pattern) else Pattern(*c) for c in self.candidates]
        self.progress_bar: Any = None
        self.sizes: dict[int, Tensor] = {}
        self.errors: dict[int, Tensor] = {}
        self.norms: dict[int, Tensor] = {}
        self._scores: tuple[Tensor, Tensor] | None = None

    def validate(self) -> None:
        self.check("candidates", len(self.candidates) > 0, "one pattern or more")

    def attend(self, call: AttentionCall) -> Tensor:
        """Exact attention; the errors of the candidates go to :attr:`errors`."""
        out = call.dense()
        if self.progress_bar is not None:
            self.progress_bar.update()
        if call.phase != "prefill" or not call.is_causal or call.mask is not None \
                or call.shape[4] <= self.selector.min_length:
            return out
        layer = layer_of(call)
        self._scores = self.selector.scores(call)
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
            gap = (keys.attention(call).float() - out.float()) * counts
            wrong = gap.square().sum((0, 2, 3)) if self.error == "relative_l2" else (gap.abs() > DIFFERS).sum((0, 2, 3))
            self.errors[layer][number] += wrong.double().cpu()
        self._scores = None
        return out

    def relative_errors(self, layer: int) -> Tensor:
        """(candidates, heads) fp64: norm of the difference of the outputs over that of exact attention."""
        return (self.errors[layer] / self.norms[layer].clamp(min=1e-300)).sqrt()

    def assignment(self, layers: int | None = None) -> Assignment:
        """The candidate with the smallest error of each head, the first of equals.

        Layers that were never measured, such as those with a sliding window of their own, which stay exact, get
        :data:`DEFAULT`.

        Args:
            layers: of the model; None: as many as were seen.

        Raises:
            ValueError: no layer was measured.
        """
        if not self.sizes:
            raise ValueError(
                f"batches: expected texts longer than min_length={self.selector.min_length} tokens and a model with "
                "causal attention in some layer, got no layer to measure. Pass a longer text, or make min_length "
                "smaller")
        count = layers or max(self.sizes) + 1
        heads = next(iter(self.sizes.values())).shape[-1]
        assignment: Assignment = []
        for layer in range(count):
            if layer not in self.sizes:
                assignment.append([DEFAULT] * heads)
                continue
            errors = self.errors[layer] if self.error == "count" else self.relative_errors(layer)
            best = (errors.clamp(min=NOISE) if self.error == "relative_l2" else errors).argmin(0)
            sizes = self.sizes[layer].cpu()
            assignment.append([
                Pattern(self.tried[c].name, int(sizes[c, 0, h]), int(sizes[c, 1, h]), float(errors[c, h]))
                for h, c in enumerate(best.tolist())])
        return assignment

    def _counts(self, call: AttentionCall) -> Tensor:
        """(B, 1, Lq, 1) bool: the queries whose error counts."""
        position = torch.arange(call.shape[3], device=call.query.device)[:, None]
        if self.last is None:
            return (position >= 0)[None, None]
        return position >= call.lengths()[0][:, None, None, None] - self.last

    def _twin(self, layer: int, number: int) -> int | None:
        """An earlier candidate that has become the same: on short texts the smallest sizes are taken by several."""
        return next((n for n in range(number) if self.tried[n].name == self.tried[number].name
                     and torch.equal(self.sizes[layer][n], self.sizes[layer][number])), None)

    def _select(self, call: AttentionCall, pattern: Pattern, sizes: Tensor) -> Keys:
        return self.selector.keys(call, [pattern.name] * call.shape[1], sizes[0], sizes[1], self._scores)

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
        estimated = {"a_shape": 0, "vertical_slash": min(self.selector.last_q, layout.q_len) * layout.k_len,
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
    sizes = (given * factor).round().long()
    if pattern.name == "vertical_slash":
        return torch.stack([sizes[0].clamp(min=LEAST_COLUMNS), sizes[1].clamp(min=LEAST_DIAGONALS)])
    if pattern.name == "a_shape":
        return torch.stack([given[0], sizes[1].clamp(min=1)])
    return torch.stack([sizes[0].clamp(min=1), given[1]])


# ------------------------------------------------------------- heads whose pattern is known, which a search must find
HEAD_DIM, BLOCK, SPREAD = 64, 64, 0.3
"""Scores are plain products, with a scale of 1. ``SPREAD``: standard deviation of what is no pattern, in every
dimension of queries and keys."""


def streaming(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """(L, D) queries and keys that like the first 128 tokens and every fourth one nearby, to an eighth of the length.

    Every fourth, because what is smooth over a block is a block pattern as well: its means show it.
    """
    g = torch.Generator().manual_seed(seed)
    frequencies = math.pi / 2 + torch.randn(31, generator=g) * 8 / length
    q, k = (SPREAD * torch.randn(length, HEAD_DIM, generator=g) for _ in range(2))
    near = _waves(torch.arange(length), frequencies) * math.sqrt(10)
    q[:, :62] += near
    k[:, :62] += near
    q[:, 62] = 1
    k[:128, 62] = 8
    return q, k


def verticals_and_diagonal(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """(L, D) queries and keys that like 16 single tokens of the first half and one token a third of the length ago."""
    g = torch.Generator().manual_seed(seed)
    frequencies = torch.rand(31, generator=g) * math.pi
    q, k = (SPREAD * torch.randn(length, HEAD_DIM, generator=g) for _ in range(2))
    q[:, :62] += _waves(torch.arange(length) - length // 3, frequencies) * math.sqrt(14)
    k[:, :62] += _waves(torch.arange(length), frequencies) * math.sqrt(14)
    q[:, 62] = 1
    k[torch.randperm(length // 2, generator=g)[:16], 62] = 13
    return q, k


def block_clusters(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """(L, D) queries and keys in blocks of 64; each block has one of 8 subjects and likes blocks of the same one."""
    g = torch.Generator().manual_seed(seed)
    subject = torch.randint(0, 8, (-(-length // BLOCK),), generator=g).repeat_interleave(BLOCK)[:length]
    one_hot = torch.nn.functional.one_hot(subject, HEAD_DIM) * math.sqrt(12)
    q, k = (one_hot + SPREAD * torch.randn(length, HEAD_DIM, generator=g) for _ in range(2))
    return q, k


KNOWN_HEADS = {"a_shape": streaming, "vertical_slash": verticals_and_diagonal, "block_sparse": block_clusters}
"""The pattern that the search should find, and the head."""


def known_heads(length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (1, 3, L, D) of one head of each kind, in the order of :data:`KNOWN_HEADS`."""
    pairs = [make(length, seed + n) for n, make in enumerate(KNOWN_HEADS.values())]
    value = torch.randn(1, len(pairs), length, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    return torch.stack([q for q, _ in pairs])[None], torch.stack([k for _, k in pairs])[None], value


def _waves(position: Tensor, frequencies: Tensor) -> Tensor:
    """(L, 2 n) features whose products depend on distance alone (random Fourier features); a product of 1 at 0."""
    angle = position[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], 1) / math.sqrt(len(frequencies))
