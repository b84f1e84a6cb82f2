"""What the gate is compared with: cross-attention as everybody has it, and the theme as a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import Seq2SeqLMOutput

from looseleaf_theme_transformer.model import (
    GatedDecoderLayer,
    ThemeEncoderLayer,
    ThemeTransformer,
    ThemeTransformerConfig,
)


class SequentialDecoderLayer(GatedDecoderLayer):
    """Self-attention, then cross-attention to the theme always, with ordinary positions; no gate, no theme labels."""

    def __init__(self, config: ThemeTransformerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.cross_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor, place: Tensor, theme_place: Tensor, gate: Tensor, memory: Tensor | None,
                mask: Any = None, memory_mask: Any = None, cache: Any = None) -> Tensor:
        """See :class:`GatedDecoderLayer`."""
        x = self.attention_norm(x + self.dropout(self.self_attn(x + place, mask, past_key_values=cache)))
        theme = self.cross_attn(x + place, memory_mask, key_value_states=memory, past_key_values=cache)
        x = self.cross_norm(x + self.dropout(theme))
        out: Tensor = self.final_norm(x + self.dropout(self.feed_forward(x)))
        return out


class SequentialTransformer(ThemeTransformer):
    """The usual encoder-decoder on the same tokens."""

    decoder_layer: Callable[..., nn.Module] = SequentialDecoderLayer


class PromptDecoderLayer(ThemeEncoderLayer):
    """Causal self-attention alone."""

    def __init__(self, config: ThemeTransformerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn.is_causal = True

    def forward(self, x: Tensor, place: Tensor, theme_place: Tensor, gate: Tensor,  # type: ignore[override]
                memory: Tensor | None, mask: Any = None, memory_mask: Any = None, cache: Any = None) -> Tensor:
        """See :class:`GatedDecoderLayer`."""
        x = self.attention_norm(x + self.dropout(self.self_attn(x + place, mask, past_key_values=cache)))
        out: Tensor = self.final_norm(x + self.dropout(self.feed_forward(x)))
        return out


class PromptTransformer(ThemeTransformer):
    """A decoder alone, with the theme in front of the piece, where it stays until it is out of the window.

    :meth:`of` makes one as large as a Theme Transformer.
    """

    decoder_layer: Callable[..., nn.Module] = PromptDecoderLayer

    @classmethod
    def of(cls, config: ThemeTransformerConfig) -> PromptTransformer:
        """A prompt model with as many parameters, in whole layers, as a Theme Transformer of ``config``."""
        width, inner = config.hidden_size, config.intermediate_size
        attention, rest = 4 * width * width, 2 * width * inner
        total = config.encoder_layers * (attention + rest) + config.decoder_layers * (2 * attention + rest)
        layers = max(1, round(total / (attention + rest)))
        return cls(ThemeTransformerConfig(**{**config.to_dict(), "encoder_layers": 0, "decoder_layers": layers,
                                             "exclusive": [0.0] * layers}))

    def encode(self, theme_ids: Tensor, theme_attention_mask: Tensor | None = None) -> Tensor | None:
        """There is no encoder: None."""
        return None

    def forward(self, input_ids: Tensor, theme_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                theme_attention_mask: Tensor | None = None, theme_labels: Tensor | None = None,
                labels: Tensor | None = None, past_key_values: Any = None, use_cache: bool = False,
                encoder_outputs: Any = None, **kwargs: Any) -> Seq2SeqLMOutput:
        """See :meth:`ThemeTransformer.forward`; ``theme_ids`` come in front of ``input_ids``, None: nothing does."""
        front = 0
        if theme_ids is not None:
            front = theme_ids.shape[1]
            if attention_mask is None:
                attention_mask = input_ids != 0
            before = theme_ids != 0 if theme_attention_mask is None else theme_attention_mask.bool()
            attention_mask = torch.cat([before, attention_mask.bool()], 1)
            input_ids = torch.cat([theme_ids, input_ids], 1)
            if labels is not None:
                labels = nn.functional.pad(labels, (front, 0), value=-100)
        nothing = torch.zeros_like(input_ids)  # theme labels, which no layer looks at
        out = super().forward(input_ids, attention_mask=attention_mask, theme_labels=nothing, labels=labels,
                              past_key_values=past_key_values, use_cache=use_cache, encoder_outputs=(None,))
        assert out.logits is not None
        out.logits = out.logits[:, front:]
        return out

    def _prefix(self, theme_ids: list[int]) -> list[int]:
        return theme_ids
