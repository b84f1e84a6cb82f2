"""What the layers of a model hold where the last word of a context ends."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf import capture
from looseleaf import progress as progress_
from looseleaf.errors import UnsupportedModelError
from looseleaf.modes import evaluating, own_random_state
from looseleaf.probes.hooks import matching_modules
from looseleaf.unwrap import unwrapped
from looseleaf_text import decoder_layers
from looseleaf_text.batching import device_of, positions, text_config
from looseleaf_text.encoding import Encoding
from looseleaf_word_class.windows import Windows


@dataclasses.dataclass(frozen=True)
class Representations:
    """One vector a window from each layer.

    Attributes:
        states: name of the module -> (N, D), in the type the model computes in, on the CPU.
        words: vectors of the last word alone, the mean over its sub-words, (N, D); None where the model has none.
    """

    states: dict[str, Tensor]
    words: Tensor | None


def layer_names(model: nn.Module, layers: Sequence[str] | None = None) -> list[str]:
    """Names of the modules that are looked at: those that match ``layers``, else the layers of a decoder.

    Raises:
        ValueError: a pattern that matches nothing.
        UnsupportedModelError: no patterns, and the layers could not be found.
    """
    if layers is not None:
        return list(matching_modules(model, layers))
    try:
        return list(decoder_layers(model))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"the layers of {type(unwrapped(model)).__name__} could not be found: name them, "
                                    f"such as layers=('rnn.*',) ({error})") from error


@torch.no_grad()
def representations(model: nn.Module, processor: Any, windows: Windows, layers: Sequence[str] | None = None, *,
                    batch: int = 64, progress: bool | None = None) -> Representations:
    """Outputs of layers at the last sub-word of each context; nothing after it is ever read.

    Contexts are batched with others of as many tokens, so that nothing is padded. A beginning-of-text token goes first
    where the tokenizer has one.

    Args:
        model: a causal language model of transformers, or any module that takes ids, int64 (B, L), and whose layers
            give (B, L, D).
        processor: the tokenizer; or a function from the words of a context to ids.
        windows: the contexts.
        layers: name patterns of modules; None: the layers of the decoder.
        batch: contexts at a time.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: an unknown layer, a layer of another shape, or a context without tokens or with too many.
        UnsupportedModelError: the layers could not be found.
    """
    names = layer_names(model, layers)
    rows, starts = _ids(processor, windows)
    limit = positions(text_config(unwrapped(model))) if hasattr(unwrapped(model), "config") else None
    longest = max(map(len, rows))
    if limit is not None and longest > limit:
        raise ValueError(f"contexts: expected at most {limit} tokens, the positions of the model, got {longest}: "
                         "shorten them")
    by_length: dict[int, list[int]] = {}
    for n, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(n)
    parts = [own[n:n + batch] for own in by_length.values() for n in range(0, len(own), batch)]
    call = _caller(model)
    table = _word_vectors(model)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    words: list[Tensor] = []

    def pick(output: Tensor) -> Tensor:
        if output.dim() != 3 or tuple(output.shape[:2]) != (len(part), len(rows[part[0]])):
            raise ValueError(f"layers: expected modules that give (batch, length, width), here ({len(part)}, "
                             f"{len(rows[part[0]])}, ...), got {tuple(output.shape)}: name others, or make the module "
                             "batch_first")
        return output[:, -1]

    with evaluating(model):
        for part in progress_.track(parts, "contexts", len(parts), progress):
            ids = torch.tensor([rows[n] for n in part], device=device_of(model))
            with capture(model, names, pick) as outputs:
                call(ids)
            for name in names:
                if len(outputs[name]) != 1:
                    raise ValueError(f"layers: expected modules that run once on a context, got {name}, which ran "
                                     f"{len(outputs[name])} times")
                found[name].append(outputs[name][0].cpu())
            if table is not None:
                words += [table(ids[i, starts[n]:]).mean(0).cpu() for i, n in enumerate(part)]
    back = torch.tensor([n for part in parts for n in part]).argsort()
    return Representations({name: torch.cat(own)[back] for name, own in found.items()},
                           torch.stack(words)[back] if table is not None else None)


def _ids(processor: Any, windows: Windows) -> tuple[list[list[int]], list[int]]:
    """Ids of each context, and where its last word begins."""
    if not hasattr(processor, "decode"):  # a function of one's own, an id or more for each word
        rows = [[int(i) for i in processor(context)] for context in windows.contexts]
        starts = [len(row) - 1 for row in rows]
    else:
        encoding = Encoding(processor)
        begin = encoding.begin
        if not begin and getattr(processor, "bos_token_id", None) is not None:
            begin = [processor.bos_token_id]
        bare = encoding.bare(windows.written)
        starts = [len(begin) + first for first in _last_words(processor, encoding, windows, bare)]
        rows = [[*begin, *ids] for ids in bare]
    empty = next((n for n, row in enumerate(rows) if not row or starts[n] >= len(row)), None)
    if empty is not None:
        raise ValueError(f"contexts: expected tokens, got none for {windows.written[empty]!r}")
    return rows, starts


def _last_words(tokenizer: Any, encoding: Encoding, windows: Windows, bare: list[list[int]]) -> list[int]:
    """The first token that has a character of the last word, by the tokenizer's offsets where it has them."""
    begins = [len(text) - len(context[-1]) for text, context in zip(windows.written, windows.contexts, strict=True)]
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(windows.written, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return [next((n for n, (_, end) in enumerate(own[:len(ids)]) if end > begin), len(ids) - 1)
                for own, ids, begin in zip(offsets, bare, begins, strict=True)]
    heads = encoding.bare([text[:begin].rstrip() for text, begin in zip(windows.written, begins, strict=True)])
    # without offsets: what comes after the tokens of all words but the last, where these stay as they are
    return [len(head) if ids[:len(head)] == head and len(head) < len(ids) else len(ids) - 1
            for head, ids in zip(heads, bare, strict=True)]


def _caller(model: nn.Module) -> Callable[[Tensor], Any]:
    """What runs a model on ids, without computing logits or a cache that nobody reads where it can do without."""
    known = inspect.signature(unwrapped(model).forward).parameters
    if "input_ids" not in known:
        return model
    options = {name: value for name, value in (("use_cache", False), ("logits_to_keep", 1)) if name in known}

    def call(ids: Tensor) -> Any:
        masks = {"attention_mask": torch.ones_like(ids)} if "attention_mask" in known else {}
        return model(input_ids=ids, **masks, **options)

    return call


def _word_vectors(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    try:
        inner: Any = unwrapped(model)
        return inner.get_input_embeddings()  # type: ignore[no-any-return]
    except (AttributeError, NotImplementedError):
        return None


def untrained(model: nn.Module, seed: int = 0) -> nn.Module:
    """A model of the same architecture with the weights that training begins from; ``model`` stays as it is.

    A model of transformers is made anew from its configuration, which holds its weights a second time. Of any other, a
    copy has ``reset_parameters`` called on all its modules.

    Raises:
        UnsupportedModelError: some weights could not be reset.
    """
    inner = unwrapped(model)
    parameter = next(inner.parameters(), None)
    with own_random_state(seed):
        if hasattr(inner, "config_class"):
            config = copy.deepcopy(inner.config)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            fresh: nn.Module = type(inner)(config)
        else:
            fresh = copy.deepcopy(inner)
            reset: set[int] = set()
            for module in fresh.modules():
                reset_parameters: Any = getattr(module, "reset_parameters", None)
                if callable(reset_parameters):
                    reset_parameters()
                    reset |= {id(p) for p in module.parameters()}
            left = [name for name, p in fresh.named_parameters() if id(p) not in reset]
            if left or not reset:
                raise UnsupportedModelError(f"{type(inner).__name__}: expected modules with reset_parameters, got "
                                            f"weights without: {', '.join(left[:3]) or 'none at all'}: pass "
                                            "untrained=False")
    if parameter is not None:
        fresh = fresh.to(parameter.device, parameter.dtype if parameter.is_floating_point() else None)
    return fresh.eval()


__all__ = ["Representations", "layer_names", "representations", "untrained"]
