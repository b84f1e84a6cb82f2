"""What Token Prepending is measured against: the same model without it."""

from __future__ import annotations

from typing import Any

from looseleaf_token_prepending.encoder import SentenceEncoder, Settings
from looseleaf_token_prepending.templates import templates_of, without_placeholder


def last_token(model: Any, tokenizer: Any, exit_layer: int = -1, normalize: bool = True) -> SentenceEncoder:
    """The last token of the bare text.

    Args:
        model: a decoder of transformers.
        tokenizer: its tokeniser.
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
        tokenizer: its tokeniser.
        prompt: a name of :data:`TEMPLATES`, or a template with ``{text}``.
        exit_layer: the layer whose output is taken, as in :class:`Settings`.
        normalize: to length 1.
    """
    bare = tuple(map(without_placeholder, templates_of(prompt)))
    return SentenceEncoder(model, tokenizer, Settings(bare, exit_layer=exit_layer, normalize=normalize))
