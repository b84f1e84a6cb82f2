"""The method once more, as plainly as it can be written: one prompt, one layer after the other, no hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def embed_one(model: Any, ids: Sequence[int], at: int, placeholder: Tensor, start_layer: int, end_layer: int,
              exit_layer: int) -> Tensor:
    """The embedding of one prompt by a model of the Llama class.

    Args:
        model: ``LlamaModel``: embeddings, layers, final norm.
        ids: token ids of the whole prompt.
        at: place of the placeholder.
        placeholder: its embedding, (hidden,).
        start_layer, end_layer, exit_layer: as in :class:`Settings`, from 1.

    Returns:
        (hidden,) state of the last token after ``exit_layer``, not normalised to length 1.
    """
    hidden = model.embed_tokens(torch.tensor([list(ids)]))
    hidden[0, at] = placeholder
    places = torch.arange(len(ids))[None]
    angles = model.rotary_emb(hidden, position_ids=places)
    for number, layer in enumerate(model.layers, start=1):
        if start_layer < number <= end_layer:
            hidden[0, at] = hidden[0, -1]
        # without a mask a layer's attention is causal over a whole sequence
        hidden = layer(hidden, attention_mask=None, position_ids=places, position_embeddings=angles, use_cache=False)
        if number == exit_layer < len(model.layers):
            return hidden[0, -1]
    return model.norm(hidden)[0, -1]
