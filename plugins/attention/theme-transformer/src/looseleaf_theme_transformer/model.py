"""The Theme Transformer: an encoder for the theme, and a decoder that attends to it where the theme is to return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from looseleaf.modes import evaluating
from looseleaf.progress import bar as progress_bar_
from looseleaf_theme_transformer.music import Piece
from looseleaf_theme_transformer.tokens import (
    TEMPO,
    TEMPOS,
    THEME_END,
    THEME_START,
    Grammar,
    ThemeTokenizer,
    theme_labels,
)


class ThemeTransformerConfig(PreTrainedConfig):
    """Sizes of a Theme Transformer; the defaults are the authors'.

    Args:
        tokenizer: arguments of the :class:`ThemeTokenizer`, which a saved model carries along.
        vocab_size, theme_start_id, theme_end_id: what the tokenizer says; for other vocabularies, set them.
        hidden_size, num_attention_heads, intermediate_size: width, heads, and width of the feed-forward layers.
        encoder_layers, decoder_layers: how many.
        exclusive: e of each decoder layer: 1, in a theme region the layer does not see its own past. None: 0 in the
            first half of the layers, 1 in the second.
        dropout: of embeddings and of what each sub-layer adds; ``attention_dropout`` of attention weights.
        window: most tokens that generation looks back on.
        memory_offset: position of the first token of the theme: 0.1, as in the authors' code.
    """

    model_type = "theme-transformer"

    def __init__(self, tokenizer: dict[str, Any] | None = None, vocab_size: int | None = None,
                 theme_start_id: int | None = None, theme_end_id: int | None = None, hidden_size: int = 256,
                 num_attention_heads: int = 8, intermediate_size: int = 1024, encoder_layers: int = 6,
                 decoder_layers: int = 6, exclusive: Sequence[float] | None = None, dropout: float = 0.1,
                 attention_dropout: float = 0.1, window: int = 512, memory_offset: float = 0.1,
                 **kwargs: Any) -> None:
        words = ThemeTokenizer(**(tokenizer or {}))
        self.tokenizer = words.to_dict()
        self.vocab_size = len(words) if vocab_size is None else vocab_size
        self.theme_start_id = words.id(THEME_START) if theme_start_id is None else theme_start_id
        self.theme_end_id = words.id(THEME_END) if theme_end_id is None else theme_end_id
        self.hidden_size, self.num_attention_heads = hidden_size, num_attention_heads
        self.intermediate_size = intermediate_size
        self.encoder_layers, self.decoder_layers = encoder_layers, decoder_layers
        self.exclusive = [float(n >= decoder_layers // 2) for n in range(decoder_layers)] if exclusive is None \
            else list(exclusive)
        self.dropout, self.attention_dropout, self.window = dropout, attention_dropout, window
        self.memory_offset = memory_offset
        for name, ok, expected in (
                ("hidden_size", hidden_size % (2 * num_attention_heads) == 0, "a multiple of twice the heads"),
                ("exclusive", len(self.exclusive) == decoder_layers, f"one number for each of {decoder_layers} layers"),
                ("window", window >= 4, "an integer >= 4")):
            if not ok:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")
        super().__init__(**{"pad_token_id": 0, "is_encoder_decoder": True, **kwargs})


def sinusoids(positions: Tensor, size: int) -> Tensor:
    """pe: sine and cosine by turns of each position, (...,) -> (..., size) float32."""
    rates = torch.exp(torch.arange(0, size, 2, device=positions.device) * (-torch.log(torch.tensor(1e4)) / size))
    angles = positions[..., None].float() * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


class ThemeAttention(nn.Module):
    """Multi-head attention through transformers' ``AttentionInterface``, so that any backend can be attached to it."""

    def __init__(self, config: ThemeTransformerConfig, layer_idx: int, is_causal: bool = False) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, is_causal
        self.num_heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.scaling, self.dropout = self.head_dim ** -0.5, config.attention_dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4))

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, key_value_states: Tensor | None = None,
                past_key_values: EncoderDecoderCache | None = None, **kwargs: Any) -> Tensor:
        """Attention of (B, Lq, d) to itself, or to ``key_value_states`` (B, Lk, d); (B, Lq, d)."""
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        cross, cache = key_value_states is not None, past_key_values
        if cross and cache is not None and cache.is_updated.get(self.layer_idx):
            layer: Any = cache.cross_attention_cache.layers[self.layer_idx]
            key, value = layer.keys, layer.values
        else:
            source = key_value_states if key_value_states is not None else hidden_states
            key, value = (proj(source).view(*source.shape[:2], -1, self.head_dim).transpose(1, 2)
                          for proj in (self.k_proj, self.v_proj))
            if cache is not None:
                part = cache.cross_attention_cache if cross else cache.self_attention_cache
                key, value = part.update(key, value, self.layer_idx)
                if cross:
                    cache.is_updated[self.layer_idx] = True
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _eager)
        out, _ = attend(self, query, key, value, attention_mask, scaling=self.scaling,
                        dropout=self.dropout if self.training else 0.0, **kwargs)
        return self.out_proj(out.reshape(*hidden_states.shape))


def _eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
           scaling: float, dropout: float = 0.0, **kwargs: Any) -> tuple[Tensor, Tensor]:
    scores = query @ key.mT * scaling
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ThemeEncoderLayer(nn.Module):
    """A post-norm layer of self-attention and feed-forward."""

    def __init__(self, config: ThemeTransformerConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = ThemeAttention(config, layer_idx)
        self.feed_forward = _feed_forward(config)
        self.attention_norm, self.final_norm = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Any) -> Tensor:
        """(B, L, d) -> (B, L, d)."""
        x = self.attention_norm(x + self.dropout(self.self_attn(x, mask)))
        out: Tensor = self.final_norm(x + self.dropout(self.feed_forward(x)))
        return out


class GatedDecoderLayer(nn.Module):
    """Self-attention and theme-aligned cross-attention side by side, behind a gate (paper, section IV; the code)."""

    def __init__(self, config: ThemeTransformerConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = ThemeAttention(config, layer_idx, is_causal=True)
        self.cross_attn = ThemeAttention(config, layer_idx)
        self.feed_forward = _feed_forward(config)
        self.attention_norm, self.final_norm = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.dropout, self.exclusive = nn.Dropout(config.dropout), float(config.exclusive[layer_idx])

    def forward(self, x: Tensor, place: Tensor, theme_place: Tensor, gate: Tensor, memory: Tensor | None,
                mask: Any = None, memory_mask: Any = None, cache: EncoderDecoderCache | None = None) -> Tensor:
        """One layer.

        Args:
            x: (B, L, d).
            place, theme_place: pe(t) and pe(l_t), (B, L, d).
            gate: [l_t > 0], (B, L, 1).
            memory: the theme as the encoder gives it, (B, M, d).
        """
        own = self.self_attn(x + place, mask, past_key_values=cache)
        theme = self.cross_attn(x + theme_place, memory_mask, key_value_states=memory, past_key_values=cache)
        both = ((1 - self.exclusive * gate) * own + gate * theme) / 2
        x = self.attention_norm(x + self.dropout(both))
        out: Tensor = self.final_norm(x + self.dropout(self.feed_forward(x)))
        return out


def _feed_forward(config: ThemeTransformerConfig) -> nn.Sequential:
    return nn.Sequential(nn.Linear(config.hidden_size, config.intermediate_size), nn.GELU(),
                         nn.Dropout(config.dropout), nn.Linear(config.intermediate_size, config.hidden_size))


class ThemeTransformer(PreTrainedModel):
    """A theme and the tokens so far in, logits of the next token out; :meth:`generate` makes whole pieces.

    ``forward`` has the names of transformers' sequence-to-sequence models, so that ``Trainer`` trains it;
    ``save_pretrained`` and ``from_pretrained`` work, and the tokenizer comes along.
    """

    config: ThemeTransformerConfig
    config_class = ThemeTransformerConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    decoder_layer: Callable[..., nn.Module] = GatedDecoderLayer

    def __init__(self, config: ThemeTransformerConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, size)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = nn.ModuleList(ThemeEncoderLayer(config, n) for n in range(config.encoder_layers))
        self.decoder = nn.ModuleList(self.decoder_layer(config, n) for n in range(config.decoder_layers))
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.head = nn.Linear(size, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Xavier's uniform weights and no biases [ours]."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.xavier_uniform_(module.weight)
            if isinstance(module, nn.Linear):
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    @property
    def tokenizer(self) -> ThemeTokenizer:
        """The vocabulary."""
        return ThemeTokenizer(**self.config.tokenizer)

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of tokens, of theme and piece."""
        return self.embedding

    def encode(self, theme_ids: Tensor, theme_attention_mask: Tensor | None = None) -> Tensor | None:
        """The memory M of themes (B, M) of ids, (B, M, d)."""
        mask = (theme_ids != 0) if theme_attention_mask is None else theme_attention_mask.bool()
        x = self.embedding(theme_ids)
        positions = mask.cumsum(-1).sub(1).clamp(min=0) + self.config.memory_offset
        x = self.dropout(x + sinusoids(positions, x.shape[-1]).to(x.dtype))
        seen = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=_or_none(mask))
        for layer in self.encoder:
            x = layer(x, seen)
        out: Tensor = self.encoder_norm(x)
        return out

    def forward(self, input_ids: Tensor, theme_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                theme_attention_mask: Tensor | None = None, theme_labels: Tensor | None = None,
                labels: Tensor | None = None, past_key_values: EncoderDecoderCache | None = None,
                use_cache: bool = False, encoder_outputs: Any = None, **kwargs: Any) -> Seq2SeqLMOutput:
        """Logits of each next token.

        Args:
            input_ids: the piece so far, (B, L); with ``past_key_values`` what follows the cached tokens. Id 0 is
                padding, on either side.
            theme_ids: the theme with its markers, (B, M), see :meth:`ThemeTokenizer.theme`.
            attention_mask, theme_attention_mask: (B, cached + L) and (B, M), 1 for tokens; None: all that are not 0.
            theme_labels: l_t of each token, (B, L); None: counted from the ids, which must begin outside a region.
            labels: targets (B, L), shifted inside; -100 and 0 are left out of the loss.
            past_key_values, use_cache: as in transformers.
            encoder_outputs: the memory, as the first entry of a tuple, in the place of ``theme_ids``.

        Raises:
            ValueError: neither theme nor memory.
        """
        if theme_ids is None and encoder_outputs is None:
            raise ValueError("theme_ids: expected the tokens of a theme, or encoder_outputs, got neither")
        if theme_attention_mask is None and theme_ids is not None:
            theme_attention_mask = theme_ids != 0
        memory = encoder_outputs[0] if encoder_outputs is not None else self.encode(
            theme_ids, theme_attention_mask)  # type: ignore[arg-type]
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        length = input_ids.shape[1]
        if attention_mask is None:
            attention_mask = nn.functional.pad(input_ids != 0, (cached, 0), value=True)
        positions = attention_mask.long().cumsum(-1).sub(1).clamp(min=0)[:, -length:]
        if theme_labels is None:
            theme_labels = _labels(input_ids, self.config)
        x = self.embedding(input_ids)
        place, theme_place = (sinusoids(p, x.shape[-1]).to(x.dtype) for p in (positions, theme_labels))
        gate = (theme_labels > 0)[..., None].to(x.dtype)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=_or_none(attention_mask),
            past_key_values=None if past_key_values is None else past_key_values.self_attention_cache)
        memory_mask = None if memory is None else create_bidirectional_mask(
            config=self.config, inputs_embeds=x, attention_mask=_or_none(theme_attention_mask),
            encoder_hidden_states=memory)
        x = self.dropout(x)
        for layer in self.decoder:
            x = layer(x, place, theme_place, gate, memory, mask, memory_mask, past_key_values)
        logits = self.head(self.decoder_norm(x))
        loss = None
        if labels is not None:
            targets = labels[:, 1:].masked_fill(labels[:, 1:] == 0, -100)
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())
        return Seq2SeqLMOutput(loss=loss, logits=logits, past_key_values=past_key_values,
                               encoder_last_hidden_state=memory)

    # ------------------------------------------------------------------ generation
    def generate(self, theme: Piece | Sequence[int], bars: int = 32, *, temperature: float = 1.2, top_p: float = 0.9,
                 seed: int = 0, hop: int = 1, tempo: float | None = None, progress: bool | None = None) -> Piece:
        """A piece of a number of bars in which the theme returns; whatever the weights, it parses.

        Args:
            theme: a piece (its first theme region, or all of it), or ids from Theme_Start to Theme_End.
            bars: how many bars to make.
            temperature: divides the logits; top_p: fraction of probability from which tokens are drawn, the likeliest
                first. (The authors' code drops the least likely token only, whatever ``top_p``; ours is what it says.)
            seed: of the draws.
            hop: beyond the window of the configuration, how many of the oldest tokens are forgotten at once: 1 keeps
                the window full, as the authors do, and computes all of it for each token; more is faster.
            tempo: quarters a minute; None: the theme's.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            ValueError: an empty theme, ids that are not in the vocabulary, or a number out of range.
        """
        return self.generate_several(theme, bars, 1, temperature=temperature, top_p=top_p, seed=seed, hop=hop,
                                     tempo=tempo, progress=progress)[0]

    @torch.no_grad()
    def generate_several(self, theme: Piece | Sequence[int], bars: int = 32, count: int = 4, *,
                         temperature: float = 1.2, top_p: float = 0.9, seed: int = 0, hop: int = 1,
                         tempo: float | None = None, progress: bool | None = None) -> list[Piece]:
        """``count`` pieces on one theme at once; see :meth:`generate`."""
        window = self.config.window
        for name, value, ok, expected in (
                ("bars", bars, bars >= 1, ">= 1"), ("count", count, count >= 1, ">= 1"),
                ("temperature", temperature, temperature > 0, "> 0"), ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
                ("hop", hop, 1 <= hop < window, f"from 1 to {window - 1}, less than the window")):
            if not ok:
                raise ValueError(f"{name}: expected a number {expected}, got {value}")
        words, device = self.tokenizer, self.device
        theme_ids = words.theme(theme)
        for index in theme_ids:
            words.token(index)
        if tempo is None:
            tempo = theme.tempos[0][1] if isinstance(theme, Piece) else 120.0
        nearest = min(TEMPOS, key=lambda bpm: abs(bpm - tempo))
        prefix = self._prefix(theme_ids)
        beginning = [words.id(TEMPO, nearest), words.id(THEME_START)]
        rows = torch.tensor([prefix + beginning] * count, device=device)
        outputs, grammars = [list(beginning) for _ in range(count)], [Grammar(words, bars) for _ in range(count)]
        for grammar, index in ((g, i) for g in grammars for i in beginning):
            grammar.take(index)
        counted = _labels(rows, self.config) if not prefix else _labels(rows[:, len(prefix):], self.config)
        counted = nn.functional.pad(counted, (len(prefix), 0))
        draws = torch.Generator(device="cpu").manual_seed(seed)
        cache: Any = None
        with evaluating(self), progress_bar_("bars", bars, progress) as progress_bar:
            ids = torch.tensor([theme_ids] * count, device=device)
            memory = self.encode(ids)
            while not all(grammar.finished for grammar in grammars):
                if cache is None:
                    # What is forgotten is forgotten at once, so that positions stay what they were until then.
                    first = max(0, rows.shape[1] - window + (hop - 1 if rows.shape[1] > window else 0))
                    new = slice(first, None)
                else:
                    new = slice(-1, None)
                out = self(rows[:, new], encoder_outputs=(memory,), theme_labels=counted[:, new],
                           attention_mask=torch.ones(count, (cache.get_seq_length() if cache is not None else 0)
                                                     + rows[:, new].shape[1], dtype=torch.bool, device=device),
                           past_key_values=cache, use_cache=True)
                cache = out.past_key_values if out.past_key_values.get_seq_length() < window else None
                logits = out.logits[:, -1].float().cpu()
                logits = logits.masked_fill(~torch.stack([grammar.allowed() for grammar in grammars]), -torch.inf)
                chosen = torch.multinomial(nucleus(logits / temperature, top_p), 1, generator=draws)
                for index, grammar, output in zip(chosen[:, 0].tolist(), grammars, outputs, strict=True):
                    if not grammar.finished:
                        output += grammar.take(index)
                progress_bar.update(min(g.bar for g in grammars) - progress_bar.n)
                rows = torch.cat([rows, chosen.to(device)], 1)
                counted = torch.cat([counted, _next_label(counted[:, -1:], rows[:, -1:], self.config)], 1)
        name = theme.name if isinstance(theme, Piece) else "theme"
        return [words.decode(output, f"on {name}") for output in outputs]

    def _prefix(self, theme_ids: list[int]) -> list[int]:
        """What the decoder has in front of the piece."""
        return []


def _or_none(mask: Tensor | None) -> Tensor | None:
    """No mask where nothing is padding, so that attention can be computed without one."""
    return None if mask is None or bool(mask.all()) else mask


def _labels(ids: Tensor, config: ThemeTransformerConfig) -> Tensor:
    return theme_labels(ids, config.theme_start_id, config.theme_end_id)


def _next_label(last: Tensor, ids: Tensor, config: ThemeTransformerConfig) -> Tensor:
    """l of a token, given that of the one before."""
    label = torch.where(last > 0, last + 1, 0)
    return torch.where(ids == config.theme_start_id, 1, torch.where(ids == config.theme_end_id, 0, label))


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Probabilities (..., n) of the likeliest tokens that have ``top_p`` together, the others 0; one is kept always."""
    values, order = logits.softmax(-1).sort(-1, descending=True)
    kept = values.cumsum(-1) - values < top_p
    probabilities = torch.zeros_like(logits).scatter_(-1, order, values * kept)
    return probabilities / probabilities.sum(-1, keepdim=True)
