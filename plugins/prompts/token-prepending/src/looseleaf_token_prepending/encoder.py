"""Token Prepending itself: the sentence embedding of each layer stands before the sentence in the next one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from looseleaf import intervene
from looseleaf.progress import bar
from looseleaf.prompts.prompt import storable
from looseleaf_text import decoder_layers
from looseleaf_token_prepending.templates import (
    NOWHERE,
    Row,
    batches,
    check_template,
    collate,
    templates_of,
    tidy,
    tokenize,
    with_placeholder,
    without_placeholder,
)


@storable
@dataclasses.dataclass(frozen=True)
class Settings:
    """How a sentence becomes a vector. Layers are counted from 1.

    Attributes:
        templates: prompts with ``{text}`` and, where there is one, the placeholder; the embedding is the mean over
            them.
        start_layer: the first layer whose output is prepended to the next one's input; >= 1.
        end_layer: the last layer whose input is prepended to, so that the outputs of ``start_layer`` up to
            ``end_layer - 1`` are; above ``start_layer``, or 0: nothing is prepended.
        exit_layer: the layer whose output is the embedding; negative counts from the end, -1 is the last with the
            model's final normalisation. Later layers are not run.
        pooling: ``"last"`` takes the last token, ``"mean"`` the mean over all tokens.
        normalize: to length 1.
        tidy: quotes and end of the text as in the authors' evaluation.
        max_length: most tokens of prompt and text together; None: the model's context.
        seed: of the placeholder's own embedding, drawn from N(0, 1).
    """

    templates: tuple[str, ...]
    start_layer: int = 1
    end_layer: int = 0
    exit_layer: int = -1
    pooling: Literal["last", "mean"] = "last"
    normalize: bool = True
    tidy: bool = True
    max_length: int | None = None
    seed: int = 0


class SentenceEncoder:
    """A decoder of transformers as an encoder of sentences.

    Neither weights nor tokenizer are changed: the placeholder's embedding and the prepended states are put in by hooks
    that are there only during a call.

    Args:
        model: a decoder of transformers, with or without its head, in evaluation mode.
        tokenizer: its tokenizer.
        settings: see :class:`Settings`.
        batch_tokens: most positions (rows x longest row) that are run together; >= 1.

    Raises:
        ValueError: a setting that this model does not allow.
        UnsupportedModelError: the model has no stack of decoder layers.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: Settings, batch_tokens: int = 8192) -> None:
        if not isinstance(model, nn.Module) or not callable(tokenizer):
            raise ValueError("model, tokenizer: expected a decoder of transformers and its tokenizer, got "
                             f"{type(model).__name__} and {type(tokenizer).__name__}")
        if not isinstance(batch_tokens, int) or batch_tokens < 1:
            raise ValueError(f"batch_tokens: expected an integer >= 1, got {batch_tokens!r}")
        self.model = model
        self.body = body(model)
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.layers = list(decoder_layers(self.body))
        self.settings = _checked(settings, len(self.layers))
        embedding: Any = self.body.get_input_embeddings()
        self._embedding = next(name for name, module in self.body.named_modules() if module is embedding)
        self.dimension = int(embedding.weight.shape[1])
        self._placeholder = torch.randn(self.dimension, generator=torch.Generator().manual_seed(settings.seed))

    def encode(self, texts: Sequence[str], progress: bool | None = None) -> np.ndarray:
        """One vector per text.

        Args:
            texts: n texts.
            progress: show a progress bar; None: only on a terminal.

        Returns:
            float32 of shape (n, hidden), in the order of ``texts``. What a text is encoded together with makes no
            difference but rounding.

        Raises:
            ValueError: a single text in place of a list, something that is no text, or a model in training mode.
        """
        return self._finish(self.states(texts, [self.settings.exit_layer], progress)[0]).numpy()

    def states(self, texts: Sequence[str], exits: Sequence[int], progress: bool | None = None,
               between: Callable[[], None] | None = None) -> Tensor:
        """The pooled states after several layers from one run of the model, not normalised.

        Args:
            texts: n texts.
            exits: layers, counted from 1.
            progress: show a progress bar; None: only on a terminal.
            between: called before each batch; may raise to stop.

        Returns:
            float32 of shape (len(exits), n, hidden), on the CPU.
        """
        rows = self.rows(texts)
        if self.body.training:
            raise ValueError("the model is in training mode, where dropout makes every embedding different: call "
                             "model.eval() first")
        out = torch.zeros(len(exits), len(rows), self.dimension)
        device = next(self.body.parameters()).device
        with torch.inference_mode(), bar("sentences", len(rows), progress) as progress_bar:
            for batch in batches(rows, self.batch_tokens):
                if between is not None:
                    between()
                ids, mask, at = (t.to(device) for t in collate([rows[n] for n in batch]))
                for k, state in enumerate(self.forward(ids, mask, at, exits)):
                    out[k, batch] = state.float().cpu()
                progress_bar.update(len(batch))
        return out.view(len(exits), len(texts), len(self.settings.templates), self.dimension).mean(2)

    def rows(self, texts: Sequence[str]) -> list[Row]:
        """The token ids of ``texts`` in every template: all templates of the first text, then of the second ..."""
        if isinstance(texts, str):
            raise ValueError("texts: expected a list of texts, got a single text")
        wrong = next((type(t).__name__ for t in texts if not isinstance(t, str)), None)
        if wrong is not None:
            raise ValueError(f"texts: expected a list of texts, got a {wrong} in it")
        shown = [tidy(t) for t in texts] if self.settings.tidy else list(texts)
        each = [tokenize(self.tokenizer, t, shown, self.limit) for t in self.settings.templates]
        return [row for together in zip(*each, strict=True) for row in together]

    @property
    def limit(self) -> int | None:
        """Most tokens of prompt and text together."""
        config = self.body.config.get_text_config() if hasattr(self.body.config, "get_text_config") else None
        longest = getattr(config, "max_position_embeddings", None)
        return min((n for n in (self.settings.max_length, longest) if n is not None), default=None)

    def forward(self, ids: Tensor, mask: Tensor, at: Tensor, exits: Sequence[int]) -> list[Tensor]:
        """Run a batch, padded on either side.

        Args:
            ids: (B, L) int64.
            mask: (B, L), 1 for what is no padding.
            at: (B,) places of the placeholder, or -1 in rows without one.
            exits: layers, counted from 1.

        Returns:
            For each of ``exits`` the pooled states (B, hidden), in the model's dtype.
        """
        rows = torch.arange(len(ids), device=ids.device)
        last = (mask * torch.arange(1, ids.shape[1] + 1, device=ids.device)).argmax(1)
        marked = at != NOWHERE
        rows_marked, at_marked, last_marked = rows[marked], at[marked], last[marked]
        first, end, deepest = self.settings.start_layer, self.settings.end_layer, max(exits)
        found: dict[int, Tensor] = {}

        def placeholder(embedded: Tensor) -> Tensor:
            out = embedded.clone()
            out[rows_marked, at_marked] = self._placeholder.to(out)
            return out

        def pool(hidden: Tensor) -> Tensor:
            if self.settings.pooling == "last":
                return hidden[rows, last]
            weight = mask[..., None].to(hidden.dtype)
            return (hidden * weight).sum(1) / weight.sum(1)

        def after(layer: int) -> Callable[[Tensor], Tensor]:
            def change(hidden: Tensor) -> Tensor:
                if layer in exits:
                    found[layer] = pool(hidden)
                if layer == deepest:
                    raise _Reached
                if first <= layer < end:
                    hidden = hidden.clone()
                    hidden[rows_marked, at_marked] = hidden[rows_marked, last_marked]
                return hidden

            return change

        count = len(self.layers)
        touched = {*(n for n in exits if n < count), *range(first, min(end, deepest))}
        changes = {self.layers[n - 1]: after(n) for n in sorted(touched)}
        if bool(marked.any()):
            changes[self._embedding] = placeholder
        try:
            with intervene(self.body, changes):
                output = self.body(input_ids=ids, attention_mask=mask, use_cache=False,
                                   position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        except _Reached:
            return [found[n] for n in exits]
        found[count] = pool(output.last_hidden_state)  # the last layer's, after the final normalisation
        return [found[n] for n in exits]

    def embed(self, ids: Tensor, mask: Tensor, at: Tensor) -> Tensor:
        """Embeddings (B / templates, hidden) of a batch whose rows are ordered as by :meth:`rows`."""
        state = self.forward(ids, mask, at, [self.settings.exit_layer])[0]
        return self._finish(state.view(-1, len(self.settings.templates), self.dimension).mean(1))

    def _finish(self, vectors: Tensor) -> Tensor:
        return nn.functional.normalize(vectors, dim=-1) if self.settings.normalize else vectors


def body(model: Any) -> Any:
    """The model without its head, which no embedding needs."""
    inner = getattr(model, "base_model", None)
    return inner if isinstance(inner, nn.Module) else model


class _Reached(Exception):
    """The exit layer is done: what comes after it is not wanted."""


def _checked(settings: Settings, count: int) -> Settings:
    """``settings`` for a model of ``count`` layers: the exit from 1, the placeholder wherever something is prepended.

    Raises:
        ValueError: a layer the model does not have, or a template that is none.
    """
    first, end, leave = settings.start_layer, settings.end_layer, settings.exit_layer
    if end and not 1 <= first < end <= count:
        raise ValueError(f"expected start_layer >= 1 and end_layer above it up to {count}, the model's layers, or "
                         f"end_layer=0 for none, got start_layer={first}, end_layer={end}")
    if not 1 <= abs(leave) <= count:
        raise ValueError(f"exit_layer: expected one of the model's layers, 1 to {count} or -{count} to -1, got {leave}")
    if settings.pooling not in ("last", "mean"):
        raise ValueError(f"pooling: expected 'last' or 'mean', got {settings.pooling!r}")
    if not settings.templates:
        raise ValueError("templates: expected one template or more, got none")
    for template in settings.templates:
        check_template(template)
    templates = tuple(map(with_placeholder, settings.templates)) if end else tuple(settings.templates)
    return dataclasses.replace(settings, templates=templates, exit_layer=leave if leave > 0 else count + 1 + leave)


@torch.no_grad()
def embed_one(model: Any, ids: Sequence[int], at: int, placeholder: Tensor, start_layer: int, end_layer: int,
              exit_layer: int) -> Tensor:
    """The method as plainly as it can be written, for one prompt and a model of the Llama class: no hooks, no batch.

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


def last_token(model: Any, tokenizer: Any, exit_layer: int = -1, normalize: bool = True) -> SentenceEncoder:
    """The last token of the bare text.

    Args:
        model: a decoder of transformers.
        tokenizer: its tokenizer.
        exit_layer: the layer whose output is taken, as in :class:`Settings`.
        normalize: to length 1.
    """
    return SentenceEncoder(model, tokenizer, Settings(("{text}",), exit_layer=exit_layer, normalize=normalize,
                                                      tidy=False))


def mean_pooling(model: Any, tokenizer: Any, exit_layer: int = -1, normalize: bool = True) -> SentenceEncoder:
    """The mean over the tokens of the bare text; arguments as for :func:`last_token`."""
    return SentenceEncoder(model, tokenizer, Settings(("{text}",), exit_layer=exit_layer, pooling="mean",
                                                      normalize=normalize, tidy=False))


def prompt_eol(model: Any, tokenizer: Any, prompt: str = "prompteol", exit_layer: int = -1,
               normalize: bool = True) -> SentenceEncoder:
    """The last token of a prompt around the text, without a placeholder.

    Args:
        model: a decoder of transformers.
        tokenizer: its tokenizer.
        prompt: a name of :data:`TEMPLATES`, or a template with ``{text}``.
        exit_layer: the layer whose output is taken, as in :class:`Settings`.
        normalize: to length 1.
    """
    bare = tuple(map(without_placeholder, templates_of(prompt)))
    return SentenceEncoder(model, tokenizer, Settings(bare, exit_layer=exit_layer, normalize=normalize))
