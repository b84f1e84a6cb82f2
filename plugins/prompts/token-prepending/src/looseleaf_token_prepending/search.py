"""What the search tries, and how a try is measured: on a model with layers, or on one of texts only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from looseleaf import Budget
from looseleaf_text import decoder_layers
from looseleaf_text.model import MeteredModel
from looseleaf_text.task import fill
from looseleaf_token_prepending.encoder import SentenceEncoder, body
from looseleaf_token_prepending.quality import Development
from looseleaf_token_prepending.templates import templates_of, tidy, without_placeholder

if TYPE_CHECKING:
    from looseleaf_token_prepending.optimizer import TokenPrepending

SHARES = (1 / 4, 1 / 8, 1 / 3, 1 / 2)
"""Shares of a model's layers that are tried as ``end_layer``; the first is the default."""


@dataclasses.dataclass
class Run:
    """What one run over the texts gave: the quality at each exit layer (0 stands for a model without layers)."""

    prompt: str
    end: int
    qualities: dict[int, float]
    calls: float

    @property
    def leave(self) -> int:
        return max(self.qualities, key=lambda n: (self.qualities[n], -n))

    @property
    def fitness(self) -> float:
        return self.qualities[self.leave]


class Work:
    """How candidates are measured on a kind of model."""

    def __init__(self, plugin: TokenPrepending, model: Any, budget: Budget, data: Development, seed: int) -> None:
        self.plugin, self.model, self.budget, self.data, self.seed = plugin, model, budget, data, seed

    def candidates(self, begin: str, seen: list[Run]) -> Iterator[tuple[str, int]]:
        """(prompt, end layer) one after the other; ``seen`` grows in between."""
        raise NotImplementedError

    def qualities(self, prompt: str, end: int) -> dict[int, float]:
        """Exit layer -> quality."""
        raise NotImplementedError

    def settings(self, prompt: str, best: Run | None) -> dict[str, Any] | None:
        """Settings of the encoder found."""
        raise NotImplementedError


class Texts(Work):
    """Any language model with embeddings: only the text around can be chosen."""

    def candidates(self, begin: str, seen: list[Run]) -> Iterator[tuple[str, int]]:
        for prompt in dict.fromkeys([begin, *self.plugin.alternatives, "{text}"]):
            yield prompt, 0

    def qualities(self, prompt: str, end: int) -> dict[int, float]:
        said = [tidy(t) for t in self.data.texts] if self.plugin.tidy and prompt != "{text}" else self.data.texts
        templates = list(map(without_placeholder, templates_of(prompt)))
        vectors = MeteredModel(self.model, self.budget).embed([fill(t, {"text": s}) for s in said for t in templates])
        mean = np.asarray(vectors).reshape(len(said), len(templates), -1).mean(1)
        return {0: self.data.quality(mean)}

    def settings(self, prompt: str, best: Run | None) -> None:
        return None


class Layers(Work):
    """A local model: prompt and layers can be chosen."""

    def candidates(self, begin: str, seen: list[Run]) -> Iterator[tuple[str, int]]:
        plugin = self.plugin
        count = len(decoder_layers(body(self.model.model)))
        ends = [plugin.end_layer] if plugin.end_layer is not None else [*default_ends(count, plugin.start_layer), 0]
        for end in ends:
            yield begin, end
        chosen = max(seen, key=lambda run: run.fitness).end
        for prompt in dict.fromkeys(plugin.alternatives):
            if prompt != begin:
                yield prompt, chosen

    def qualities(self, prompt: str, end: int) -> dict[int, float]:
        encoder = self._encoder(prompt, end)
        count, fixed = len(encoder.layers), self.plugin.exit_layer
        exits = [encoder.settings.exit_layer] if fixed is not None else list(range(max(1, count // 2), count + 1))
        rows = encoder.rows(self.data.texts)
        tokens = sum(len(row.ids) for row in rows)
        self.budget.spend(calls=len(rows), tokens=tokens)
        # between batches nothing more is booked, but the clock is looked at
        states = encoder.states(self.data.texts, exits, False, self.budget.spend)
        self.model.calls += len(rows)
        self.model.tokens += tokens
        return {n: self.data.quality(state.numpy()) for n, state in zip(exits, states, strict=True)}

    def settings(self, prompt: str, best: Run | None) -> dict[str, Any]:
        encoder = self._encoder(prompt, self.plugin.end_layer if best is None else best.end)
        found = dataclasses.asdict(encoder.settings)
        return {**found, "templates": list(found["templates"]),
                "exit_layer": encoder.settings.exit_layer if best is None else best.leave}

    def _encoder(self, prompt: str, end: int | None) -> SentenceEncoder:
        plugin = dataclasses.replace(self.plugin, prompt=prompt, end_layer=end)
        return plugin.encoder(self.model.model, self.model.tokenizer, self.seed)


def default_ends(count: int, start_layer: int = 1) -> list[int]:
    """The end layers tried for a model of ``count`` layers: the default, a quarter, comes first."""
    lowest = start_layer + 1
    return list(dict.fromkeys(min(max(lowest, round(count * share)), max(count, lowest)) for share in (*SHARES, 0)))


def default_exit(count: int) -> int:
    """The default exit of a model of ``count`` layers: 5 % before the last, one layer at least."""
    return max(1, count - max(1, round(count / 20)))
