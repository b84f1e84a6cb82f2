"""A decoder's layers, and in each layer the modules whose outputs are added to the residual stream."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from looseleaf.errors import UnsupportedModelError, did_you_mean
from looseleaf.probes.hooks import intervene
from looseleaf.unwrap import named_modules, unwrapped

Part = Literal["attention", "mlp"]
PARTS: tuple[Part, ...] = ("attention", "mlp")

# What is added to the residual stream, by the names transformers uses. A norm between a block and the addition comes
# first: it would undo a change of scale made before it.
_AFTER = {"attention": ("post_self_attn_layernorm", "post_attention_layernorm"),
          "mlp": ("post_mlp_layernorm", "post_feedforward_layernorm")}
_BLOCKS = {"attention": ("self_attn", "attn", "attention", "self_attention", "linear_attn", "mixer"),
           "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "fc2")}


def decoder_layers(model: nn.Module, layers: str | None = None) -> dict[str, nn.Module]:
    """The layers of a decoder by module name, first to last; wrappers such as PEFT's are looked through.

    Args:
        model: a decoder of transformers.
        layers: name of the ``ModuleList`` that holds them; None: the outermost whose length is the configuration's
            ``num_hidden_layers``.

    Raises:
        ValueError: no module list of that name; near names are given.
        UnsupportedModelError: none could be found, or the model is an encoder with a decoder.
    """
    model = unwrapped(model)
    lists = {name: module for name, module in named_modules(model).items()
             if isinstance(module, nn.ModuleList) and module}
    if layers is not None:
        if layers not in lists:
            raise ValueError(f"layers: expected a module list of {type(model).__name__}, such as "
                             f"{', '.join(list(lists)[:5]) or '(it has none)'}, got {layers!r}."
                             f"{did_you_mean(layers, lists)}")
        return {f"{layers}.{i}": layer for i, layer in enumerate(lists[layers])}
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder with a decoder, where layers are not one "
                                    "stack: name the list of layers, such as layers='model.decoder.layers'")
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    count = getattr(text, "num_hidden_layers", None)
    candidates = [name for name, module in lists.items() if len(module) == count]
    if not candidates:
        raise UnsupportedModelError(
            f"no module list of {type(model).__name__} has {count} entries (the configuration's num_hidden_layers): "
            f"name the list of layers, layers=...; there are {', '.join(list(lists)[:5]) or 'none'}")
    # a list inside the layers (experts) can be as long by chance, but lies deeper
    name = min(candidates, key=lambda n: n.count("."))
    return {f"{name}.{i}": layer for i, layer in enumerate(lists[name])}


def contribution(name: str, layer: nn.Module, part: Part) -> str:
    """Name of the module whose output is what a layer's attention or MLP adds to the residual stream.

    Args:
        name: of the layer.
        layer: the layer.
        part: ``"attention"`` or ``"mlp"``.

    Raises:
        ValueError: an unknown part.
        UnsupportedModelError: no such module; or its output already has the residual stream in it.
    """
    if part not in PARTS:
        raise ValueError(f"part: expected {' or '.join(map(repr, PARTS))}, got {part!r}."
                         f"{did_you_mean(str(part), PARTS)}")
    children: dict[str, Any] = dict(unwrapped(layer).named_children())
    # "post_attention_layernorm" stands before the MLP in Llama, and behind the attention only where the MLP has a
    # norm behind it too
    if any(child in children for child in _AFTER["mlp"]):
        candidates: tuple[str, ...] = (*_AFTER[part], *_BLOCKS[part])
    else:
        candidates = _BLOCKS[part]
    child = next((c for c in candidates if c in children), None)
    if child is None:
        raise UnsupportedModelError(
            f"the {part} of {name} ({type(layer).__name__}) could not be found among {', '.join(children)}: use "
            "looseleaf.intervene with the module's name")
    if "residual" in inspect.signature(unwrapped(children[child]).forward).parameters:
        raise UnsupportedModelError(
            f"{name}.{child} adds the residual stream itself, so its output is not its contribution alone: use "
            "looseleaf.intervene on a module inside it")
    return f"{name}.{child}"


@contextmanager
def scale_layers(model: nn.Module, alphas: Mapping[int, float], part: Literal["attention", "mlp", "both"] = "both", *,
                 layers: str | None = None) -> Iterator[None]:
    """Multiply what layers add to the residual stream while the ``with`` block runs.

    Args:
        model: a decoder of transformers.
        alphas: layer -> factor; layers count from 0, negative ones from the end. 0 takes a contribution out, 1 leaves
            the model as it is, bit for bit. Gradients flow through.
        part: the attention's contribution, the MLP's, or each of the two.
        layers: name of the list of layers; None: it is found.

    Raises:
        ValueError: a layer that does not exist, a factor that is not finite, or an unknown part.
        UnsupportedModelError: the model's layers or their parts could not be found.
    """
    stack = list(decoder_layers(model, layers).items())
    wanted = PARTS if part == "both" else (part,)
    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    for layer, alpha in alphas.items():
        if not isinstance(layer, int) or not -len(stack) <= layer < len(stack):
            raise ValueError(f"layer: expected an integer in [{-len(stack)}, {len(stack) - 1}], for {len(stack)} "
                             f"layers of {type(model).__name__}, got {layer!r}")
        if not math.isfinite(alpha):
            raise ValueError("alphas: expected a finite number such as 0 (nothing is added) or 1 (as it is), got "
                             f"{alpha!r} for layer {layer}")
        for name in (contribution(*stack[layer], p) for p in wanted):
            if name in changes:
                raise ValueError(f"alphas: expected one factor for each layer, got two for layer {layer}, which is "
                                 "named from the start and from the end")
            changes[name] = _times(alpha)
    with intervene(model, changes):
        yield


def _times(alpha: float) -> Callable[[Tensor], Tensor]:
    return (lambda output: output) if alpha == 1 else lambda output: output * alpha


__all__ = ["PARTS", "Part", "contribution", "decoder_layers", "scale_layers"]
