"""``attach``: put an attention backend into somebody's model, and take it out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from looseleaf.attention import huggingface, takeover
from looseleaf.attention.attached import Attached, place_of
from looseleaf.attention.call import AttentionBackend, Geometry
from looseleaf.attention.watch import LEARNED
from looseleaf.errors import UnsupportedModelError
from looseleaf.names import match
from looseleaf.offload import execution_device
from looseleaf.unwrap import unwrapped


def attach(model: Any, backend: AttentionBackend, layers: str | int | Sequence[int | str] | None = None, *,
           steps: int | None = None, chunked_prefill: bool = False) -> Attached:
    """Let ``backend`` compute the attention of ``model`` until :meth:`Attached.detach` or the end of ``with``.

    There are three ways in: transformers models whose attention goes through ``AttentionInterface`` (decoders,
    encoders, ViT, CLIP ...), diffusers pipelines and models with attention processors, and any module of whose parts,
    named by pattern in ``layers``, call ``torch.nn.functional.scaled_dot_product_attention`` (timm, torchvision,
    ``nn.MultiheadAttention``, models of your own). Wrappers such as PEFT's or ``torch.compile`` are looked through.

    Args:
        model: the model or pipeline.
        backend: what computes the attention.
        layers: indices or name patterns (``"layers.3.self_attn"``, ``"blocks.*.attn"``, see
            :mod:`looseleaf.names`) of the attention modules to change; None: all that are known. Layers with a sliding
            window of their own are left exact always.
        steps: number of denoising steps of a run, for methods that change with them. In your own sampling loop also
            set ``attached.step`` before each step; diffusers pipelines do both by themselves.
        chunked_prefill: long prompts come in pieces. Otherwise several queries after a cache are taken for drafts of
            speculative decoding, which must be verified exactly.

    Raises:
        UnsupportedModelError: the model offers no way to exchange its attention, or has a backend attached already.
        ValueError: an unknown layer; near names are given.
    """
    if not isinstance(backend, AttentionBackend):
        got = f"the class {backend.__name__}" if isinstance(backend, type) else type(backend).__name__
        raise TypeError(f"backend: expected an instance of an AttentionBackend, such as SlidingWindow(window=1024), "
                        f"got {got}")
    inner = unwrapped(model)
    modules, install = _way(inner, layers)
    names, hosts = list(modules), list(modules.values())
    if huggingface.is_named(hosts) or any(place and type(place[0]) is Attached for place in map(place_of, hosts)):
        raise UnsupportedModelError(f"expected a model without a backend, got {type(inner).__name__} with one attached "
                                    "already: detach that one first (attached.detach(), or leave its with-block)")
    attached = Attached(backend, names, choose(names, layers), steps=steps, chunked_prefill=chunked_prefill)
    backend.prepare(inner, geometry(inner, [hosts[i] for i in attached.chosen], len(names)))
    with ExitStack() as undo:
        _add_learned(backend, hosts, undo)
        attached.begin(partial(install, modules), undo)
        attached._undo = undo.pop_all()
    return attached


def _way(model: Any, layers: Any) -> tuple[dict[str, nn.Module], Callable[..., None]]:
    """The attention modules of a model by name, and what installs a backend in them."""
    if (modules := huggingface.attention_layers(model)) is not None:
        return modules, partial(huggingface.install, model)
    if (denoiser := takeover.denoiser(model)) is not None:
        scheduler = getattr(model, "scheduler", None)
        return takeover.processed(denoiser), partial(takeover.install_diffusers, denoiser, scheduler)
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a torch module or a diffusers pipeline, got {name}: call the backend "
                                    "like torch.nn.functional.scaled_dot_product_attention")
    if layers is None:
        raise UnsupportedModelError(
            f"expected a transformers model whose attention goes through AttentionInterface, a diffusers model with "
            f"attention processors, or layers=..., got {name} alone: name its attention modules, such as "
            "layers='blocks.*.attn', if they call torch.nn.functional.scaled_dot_product_attention")
    every = dict(model.named_modules())
    return {n: every[n] for n in match(every, layers)}, partial(takeover.install, model)


def choose(names: Sequence[str], wanted: str | int | Iterable[int | str] | None) -> set[int]:
    """Indices of the layers that ``wanted`` means; ValueError for an index or a pattern of none."""
    if wanted is None:
        return set(range(len(names)))
    out: set[int] = set()
    for item in [wanted] if isinstance(wanted, (str, int)) else wanted:
        if not isinstance(item, int):
            out.update(names.index(name) for name in match(names, item, what="attention layer"))
        elif -len(names) <= item < len(names):
            out.add(item % len(names))
        else:
            raise ValueError(f"layers: expected an index from {-len(names)} to {len(names) - 1}, got {item}")
    return out


# ---------------------------------------------------------------------- sizes and learned modules
def geometry(model: Any, modules: Sequence[nn.Module], layers: int) -> Geometry:
    """Sizes of attention modules, as far as they and their configurations say."""
    found: set[tuple[int | None, ...]] = set()
    for module in modules:
        places = (module, getattr(module, "config", None))
        heads = _size(places, "num_heads", "num_attention_heads", "n_heads", "n_head", "heads",
                      "encoder_attention_heads")
        width = _size(places, "embed_dim", "hidden_size", "inner_dim", "d_model")
        found.add((heads, _size(places, "num_key_value_heads", "num_kv_heads") or heads,
                   _size(places, "head_dim", "attention_head_size") or (width // heads if width and heads else None)))
    columns = map(set, zip(*(found or {(None, None, None)})))
    heads, kv_heads, head_dim = (sizes.pop() if len(sizes) == 1 else None for sizes in columns)
    places = (*(getattr(m, "config", None) for m in modules[:1]), getattr(model, "config", model),
              getattr(model, "patch_embed", None))
    return Geometry(layers, heads, kv_heads, head_dim, next(filter(None, map(_grid, places)), None))


def _size(places: Iterable[Any], *names: str) -> int | None:
    """The first integer under one of some names."""
    values = (getattr(place, name, None) for place in places for name in names)
    return next((value for value in values if type(value) is int), None)


def _grid(place: Any) -> tuple[int, int, int] | None:
    """Frames, height and width in patches of what an image model takes, if ``place`` says so."""
    images = (getattr(place, name, None) for name in ("image_size", "sample_size", "img_size"))
    sizes = (next(filter(None, images), 0), getattr(place, "patch_size", None) or 0)
    (height, width), (rows, columns) = ((x, x) if isinstance(x, int) else tuple(x)[-2:] for x in sizes)
    return (1, height // rows, width // columns) if height and rows and columns else None


def _add_learned(backend: AttentionBackend, hosts: Sequence[nn.Module], undo: ExitStack) -> None:
    """Make a backend's learned modules parts of the attention modules that they are for."""
    backend.fill()
    for layer, learned in backend.modules.items():
        if not 0 <= layer < len(hosts):
            raise ValueError(f"modules: expected layers from 0 to {len(hosts) - 1}, got {layer}: this backend learned "
                             "for another model")
        host = hosts[layer]
        like = next((p for p in host.parameters() if p.is_floating_point()), None)
        if like is not None:
            learned.to((execution_device(host) or "cpu") if like.is_meta else like.device, like.dtype)
        learned.train(host.training)
        host.add_module(LEARNED, learned)
        undo.callback(host._modules.pop, LEARNED, None)
