"""A small model built as BAGEL is, for experiments and tests: two copies of every layer's weights, one attention.

Text and input pictures go through the plain weights, the tokens that are drawn through those whose names end in
``_moe_gen``, and these see the keys and values of both. Pictures are tokens of a codebook, drawn one after the other.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GEN = "_moe_gen"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a :class:`SmallUnified`: words and codes are vocabularies, ``places`` picture tokens."""

    words: int = 40
    codes: int = 16
    places: int = 16
    classes: int = 4
    text: int = 6
    width: int = 32
    layers: int = 4
    heads: int = 4
    neurons: int = 48


class KeyCache:
    """Keys, values and which of them are no padding, by layer; a layer that was skipped has none."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, real: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Add to a layer, and give all it has."""
        if layer in self.layers:
            k, v, r = self.layers[layer]
            key, value, real = torch.cat([k, key], 2), torch.cat([v, value], 2), torch.cat([r, real], 1)
        self.layers[layer] = key, value, real
        return key, value, real


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, neurons: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, neurons, bias=False)
        self.up_proj = nn.Linear(width, neurons, bias=False)
        self.down_proj = nn.Linear(neurons, width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class PairedAttention(nn.Module):
    """Causal attention with projections for each component; queries see all keys in the cache, whosever they are."""

    def __init__(self, sizes: Sizes, layer_idx: int) -> None:
        super().__init__()
        self.head_dim, self.layer_idx = sizes.width // sizes.heads, layer_idx
        for suffix in ("", GEN):
            for name in "qkvo":
                self.add_module(f"{name}_proj{suffix}", nn.Linear(sizes.width, sizes.width, bias=False))

    def forward(self, x: Tensor, *, mode: str, real: Tensor, past_key_values: KeyCache) -> tuple[Tensor, KeyCache]:
        """(B, N, width) and the cache -> the same; ``real`` (B, N) is False for padding."""
        suffix = GEN if mode == "gen" else ""

        def heads(name: str) -> Tensor:
            return self.get_submodule(f"{name}_proj{suffix}")(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q = heads("q")
        k, v, seen = past_key_values.update(heads("k"), heads("v"), real, self.layer_idx)
        queries, keys = q.shape[2], k.shape[2]
        causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        own = torch.eye(queries, keys, dtype=torch.bool).roll(keys - queries, 1)  # padding sees itself, or it is NaN
        out = F.scaled_dot_product_attention(q, k, v, causal & (seen[:, None, None] | own))
        projected: Tensor = self.get_submodule(f"o_proj{suffix}")(out.transpose(1, 2).flatten(2))
        return projected, past_key_values


class PairedLayer(nn.Module):
    """h + attention, + MLP, each with its own norm and weights for each component."""

    def __init__(self, sizes: Sizes, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = PairedAttention(sizes, layer_idx)
        for suffix in ("", GEN):
            self.add_module(f"mlp{suffix}", GatedMlp(sizes.width, sizes.neurons))
            self.add_module(f"input_layernorm{suffix}", nn.RMSNorm(sizes.width))
            self.add_module(f"post_attention_layernorm{suffix}", nn.RMSNorm(sizes.width))

    def forward(self, x: Tensor, *, mode: str, real: Tensor, past_key_values: KeyCache) -> tuple[Tensor, KeyCache]:
        """See :class:`PairedAttention`."""
        suffix = GEN if mode == "gen" else ""
        attended, cache = self.self_attn(self.get_submodule(f"input_layernorm{suffix}")(x), mode=mode, real=real,
                                         past_key_values=past_key_values)
        x = x + attended
        x = x + self.get_submodule(f"mlp{suffix}")(self.get_submodule(f"post_attention_layernorm{suffix}")(x))
        return x, cache


class SmallUnified(nn.Module):
    """Draws pictures from captions and names the class of pictures.

    ``model(text, attention_mask, codes)`` gives logits (B, places, codes) of each picture token from those before it;
    ``model(codes=codes)`` logits (B, classes).
    """

    def __init__(self, sizes: Sizes | None = None) -> None:
        super().__init__()
        self.sizes = s = sizes or Sizes()
        self.words = nn.Embedding(s.words, s.width)
        self.text_places = nn.Embedding(s.text, s.width)
        self.pictures = nn.Embedding(s.codes + 1, s.width)  # as input, with a last token that asks
        self.picture_places = nn.Embedding(s.places + 1, s.width)
        self.drawn = nn.Embedding(s.codes + 1, s.width)  # with a last token that begins
        self.drawn_places = nn.Embedding(s.places, s.width)
        self.layers = nn.ModuleList(PairedLayer(s, n) for n in range(s.layers))
        self.norm, self.norm_moe_gen = nn.RMSNorm(s.width), nn.RMSNorm(s.width)
        self.classify = nn.Linear(s.width, s.classes)
        self.code_head = nn.Linear(s.width, s.codes)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.05)

    def run(self, x: Tensor, mode: str, cache: KeyCache, real: Tensor | None = None) -> Tensor:
        """All layers on the tokens of one component."""
        real = torch.ones(x.shape[:2], dtype=torch.bool) if real is None else real
        for layer in self.layers:
            x, cache = layer(x, mode=mode, real=real, past_key_values=cache)
        return self.norm_moe_gen(x) if mode == "gen" else self.norm(x)  # type: ignore[no-any-return]

    def read(self, text: Tensor, attention_mask: Tensor) -> KeyCache:
        """The keys and values of captions (B, T)."""
        cache = KeyCache()
        self.run(self.words(text) + self.text_places.weight[:text.shape[1]], "und", cache, attention_mask.bool())
        return cache

    def forward(self, text: Tensor | None = None, attention_mask: Tensor | None = None, *, codes: Tensor) -> Tensor:
        """See the class."""
        if text is None:
            asked = torch.cat([codes, codes.new_full((len(codes), 1), self.sizes.codes)], 1)
            state = self.run(self.pictures(asked) + self.picture_places.weight, "und", KeyCache())
            return self.classify(state[:, -1])  # type: ignore[no-any-return]
        mask = torch.ones_like(text) if attention_mask is None else attention_mask
        begun = torch.cat([codes.new_full((len(codes), 1), self.sizes.codes), codes[:, :-1]], 1)
        state = self.run(self.drawn(begun) + self.drawn_places.weight, "gen", self.read(text, mask))
        return self.code_head(state)  # type: ignore[no-any-return]

    @torch.no_grad()
    def draw(self, text: Tensor, attention_mask: Tensor, seed: int = 0, temperature: float = 1.0) -> Tensor:
        """Picture tokens (B, places), drawn at random one after the other."""
        chance = torch.Generator().manual_seed(seed)
        cache, code = self.read(text, attention_mask), torch.full((len(text), 1), self.sizes.codes)
        found: list[Any] = []
        for place in range(self.sizes.places):
            state = self.run(self.drawn(code) + self.drawn_places.weight[place], "gen", cache)
            odds = (self.code_head(state[:, -1]) / temperature).softmax(-1)
            code = torch.multinomial(odds, 1, generator=chance)
            found.append(code)
        return torch.cat(found, 1)


def toy_model(layers: int = 4, seed: int = 0) -> SmallUnified:
    """A :class:`SmallUnified` with random weights, so large that every layer matters; the same for each seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallUnified(Sizes(layers=layers))
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    return model.eval()


def toy_batch(seed: int = 0, count: int = 3) -> dict[str, Tensor]:
    """Captions of mixed lengths, their mask, and pictures, for :func:`toy_model`."""
    draw, s = torch.Generator().manual_seed(seed), Sizes()
    lengths = torch.randint(2, s.text + 1, (count, 1), generator=draw)
    return {"text": torch.randint(s.words, (count, s.text), generator=draw),
            "attention_mask": (torch.arange(s.text) < lengths).long(),
            "codes": torch.randint(s.codes, (count, s.places), generator=draw)}


def toy_tasks() -> dict[str, list[dict[str, Tensor]]]:
    """A batch of each task, to calibrate on."""
    return {"generation": [toy_batch(1)], "understanding": [{"codes": toy_batch(2)["codes"]}]}
