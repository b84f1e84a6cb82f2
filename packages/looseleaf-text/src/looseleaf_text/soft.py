"""Soft prompts: learned vectors before everything a local model reads."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from looseleaf.errors import UnsupportedModelError
from looseleaf.modes import evaluating
from looseleaf.prompts.prompt import Prompt
from looseleaf.tasks import Example, Predictor
from looseleaf.unwrap import unwrapped
from looseleaf_text.batching import text_config
from looseleaf_text.local import LocalModel

if TYPE_CHECKING:
    from looseleaf_text.model import LanguageModel


@dataclasses.dataclass
class SoftPrompt(Prompt):
    """Learned vectors before everything that a local model reads, and the prompt of text that follows them.

    Attributes:
        prompt: what is read after them, such as a :class:`looseleaf_text.TextPrompt`.
        soft: see :func:`soft_prefix`.
    """

    prompt: Prompt
    soft: Tensor

    def on(self, model: LanguageModel) -> SoftPredictor:
        """See :meth:`looseleaf.Prompt.on`; ``model`` must be a :class:`looseleaf_text.LocalModel`."""
        return SoftPredictor(self, model)

    def render(self, example: Example) -> str:
        """The text of the prompt inside."""
        inner: Any = self.prompt
        text: str = inner.render(example)
        return text


class SoftPredictor(Predictor):
    """A :class:`SoftPrompt` and a local model."""

    def __init__(self, prompt: SoftPrompt, model: LanguageModel) -> None:
        self.model, self.soft, self.inner = model, prompt.soft, prompt.prompt.on(model)
        self.classes = self.inner.classes

    def scores(self, examples: Sequence[Example]) -> Any:
        """Those of the prompt inside, read after the vectors."""
        with soft_prefix(self.model, self.soft):
            return self.inner.scores(examples)

    def predict(self, examples: Sequence[Example]) -> list[Any]:
        """What the prompt inside predicts, read after the vectors."""
        with soft_prefix(self.model, self.soft):
            return self.inner.predict(examples)


@contextlib.contextmanager
def soft_prefix(model: LanguageModel, soft: Tensor) -> Iterator[None]:
    """``model`` with ``soft`` before everything it reads, for as long as the block lasts.

    Args:
        model: a :class:`looseleaf_text.LocalModel`, metered or not.
        soft: floating point; input embeddings of shape (tokens, hidden), or keys and values of shape
            (layers, 2, key-value heads, tokens, head_dim), as prefix tuning learns them.

    Raises:
        UnsupportedModelError: the model is behind a server, is no causal model, or keeps no keys and values.
        ValueError: the shape does not fit the model.
    """
    if not isinstance(model, LocalModel):
        raise UnsupportedModelError("a soft prompt: expected a LocalModel, whose embeddings it needs, got "
                                    f"{type(model).__name__}, which takes text only")
    plain = model.model
    model.model = _Prefixed(plain, soft)
    try:
        yield
    finally:
        model.model = plain


class _Prefixed(nn.Module):
    """A causal model whose cache is never empty: it begins with what the soft prompt left there."""

    def __init__(self, model: Any, soft: Tensor) -> None:
        super().__init__()
        self.inner = model
        self.config = unwrapped(model).config
        self.training = unwrapped(model).training
        self.keys_values = keys_and_values(model, soft)
        self.length = self.keys_values[0][0].shape[2]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Any = None,
                use_cache: bool = True, **more: Any) -> Any:
        """As the inner model, with the soft prompt at the first positions."""
        from transformers import DynamicCache

        rows = input_ids.shape[0]
        if past_key_values is None:
            past_key_values = DynamicCache(config=text_config(self))
            for layer, (keys, values) in enumerate(self.keys_values):
                past_key_values.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        mask = torch.cat([attention_mask.new_ones(rows, self.length), attention_mask], dim=1)
        if "position_ids" in more:
            more["position_ids"] = more["position_ids"] + self.length
        # The cache is used whatever is asked for: the soft prompt is in it.
        return self.inner(input_ids=input_ids, attention_mask=mask, past_key_values=past_key_values, use_cache=True,
                          **more)


@torch.no_grad()
def keys_and_values(model: Any, soft: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (1, heads, tokens, head_dim) of each layer that ``soft`` (see :func:`soft_prefix`) stands for.

    Raises:
        UnsupportedModelError: a layer keeps something else.
        ValueError: the shape does not fit the model.
    """
    table = unwrapped(model).get_input_embeddings().weight
    soft = soft.to(device=table.device, dtype=table.dtype)
    if soft.dim() == 5 and soft.shape[1] == 2:
        layers = [(layer[0][None], layer[1][None]) for layer in soft]
    elif soft.dim() == 2 and soft.shape[1] == table.shape[1]:
        with evaluating(model):
            cache = getattr(model(inputs_embeds=soft[None], use_cache=True), "past_key_values", None)
        layers = [(getattr(layer, "keys", None), getattr(layer, "values", None))
                  for layer in getattr(cache, "layers", [])]
        if not layers or any(part is None for layer in layers for part in layer):
            raise UnsupportedModelError(f"a soft prompt: expected a model whose layers all keep keys and values, got "
                                        f"{type(unwrapped(model)).__name__}")
    else:
        raise ValueError(f"a soft prompt that does not fit the model: expected the shape (tokens, {table.shape[1]}) or "
                         f"(layers, 2, key-value heads, tokens, head_dim), got {tuple(soft.shape)}")
    config = text_config(unwrapped(model))
    if len(layers) != config.num_hidden_layers:
        raise ValueError(f"a soft prompt that does not fit the model: expected {config.num_hidden_layers} layers, got "
                         f"{len(layers)}")
    return layers
