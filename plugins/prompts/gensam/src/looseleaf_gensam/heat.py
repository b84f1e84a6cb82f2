"""Spatial CLIP: patch features by self-attention of one kind, heat maps of words, and points on them."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf import UnsupportedModelError
from looseleaf.unwrap import unwrapped


def spatial_features(clip: nn.Module, pixels: Tensor, depth: int = 6, attention: Literal["kk", "vv"] = "kk") -> Tensor:
    """Features (B, 1 + patches, d), not normalised, of a CLIPModel: CLS of its own path, patches of a second path.

    The second path starts at the input of the first of the last ``depth`` blocks and adds in each the attention of
    LN1 of the *ordinary* path, key against key ("kk", the paper) or value against value ("vv", CLIP Surgery), without
    the MLP. The ordinary path is untouched, and hooks are gone afterwards.

    Args:
        clip: a CLIPModel of transformers; may be wrapped.
        pixels: normalised (B, 3, H, W); positions are interpolated where that is not the model's own size.
        depth: blocks of the second path; 0: patches of the ordinary path.
        attention: which projection is compared with itself.

    Raises:
        UnsupportedModelError: no vision tower with CLS and blocks as in CLIPModel.
        ValueError: more blocks than there are.
    """
    model: Any = unwrapped(clip)
    outer: Any = getattr(model, "vision_model", None)
    tower: Any = getattr(outer, "vision_model", outer)
    layers = getattr(getattr(tower, "encoder", None), "layers", None)
    if layers is None or not hasattr(getattr(tower, "embeddings", None), "class_embedding") or \
            not hasattr(model, "visual_projection") or not hasattr(layers[0].self_attn, "k_proj"):
        raise UnsupportedModelError("spatial_features: expected a CLIPModel, whose vision tower has a CLS token and a "
                                    f"projection, got {type(model).__name__}: SigLIP has none; use a CLIPModel")
    if depth > len(layers):
        raise ValueError(f"depth: expected at most {len(layers)}, the blocks of the vision tower, got {depth}")
    second, normed = list(layers[len(layers) - depth:]), []
    start: list[Tensor] = []
    with contextlib.ExitStack() as hooks:
        if second:
            hooks.callback(second[0].register_forward_pre_hook(
                lambda _, args, options: start.append(args[0] if args else options["hidden_states"]),
                with_kwargs=True).remove)
        for layer in second:
            hooks.callback(layer.layer_norm1.register_forward_hook(lambda _, __, out: normed.append(out)).remove)
        ordinary = tower(pixels, interpolate_pos_encoding=True).last_hidden_state
    path = start[0] if second else ordinary
    for layer, x in zip(second, normed, strict=True):
        attn = layer.self_attn
        split: Any = lambda y, a=attn: y.view(*y.shape[:2], -1, a.head_dim).transpose(1, 2)  # noqa: E731
        values = split(attn.v_proj(x))
        compared = values if attention == "vv" else split(attn.k_proj(x))
        mixed = F.scaled_dot_product_attention(compared, compared, values)
        path = path + attn.out_proj(mixed.transpose(1, 2).reshape(x.shape))
    both = torch.cat([ordinary[:, :1], path[:, 1:]], 1)
    projected: Tensor = model.visual_projection(tower.post_layernorm(both))
    return projected


def minmax(values: Tensor, dim: int | None = None) -> Tensor:
    """``values`` stretched to 0 to 1, whole or along a dimension; flat ones, and what is not finite, become 0.

    Flat is what differs by no more than float32 rounds sums: else noise would be stretched to a map.
    """
    values = torch.nan_to_num(values.float(), posinf=0.0, neginf=0.0)
    low = values.amin() if dim is None else values.amin(dim, keepdim=True)
    high = values.amax() if dim is None else values.amax(dim, keepdim=True)
    flat = high - low <= 1e-5 * torch.maximum(low.abs(), high.abs())
    return torch.where(flat, torch.zeros_like(values), (values - low) / (high - low).clamp(min=1e-20))


def similarities(features: Tensor, texts: Tensor, empty: Tensor, normalize: Literal["tokens", "features"]) -> Tensor:
    """Similarity (texts, patches) of a picture's features (1 + patches, d) without their redundant part.

    Args:
        features: of :func:`spatial_features`; CLS is first.
        texts: features (texts, d), normalised.
        empty: features (d,) of the empty text.
        normalize: over "tokens", as the official code does, or "features".
    """
    scaled = F.normalize(features.float(), dim=0 if normalize == "tokens" else 1)
    return (scaled @ (texts - empty).T)[1:].T


def heat_map(foreground: Tensor, background: Tensor | None = None, *, clamp: bool = False) -> Tensor:
    """Heat (patches,) from 0 to 1: foreground minus background, each stretched for each text and averaged.

    Args:
        foreground: similarities (texts, patches).
        background: likewise; None: the foreground alone.
        clamp: cut differences below 0 first.
    """
    heat = minmax(foreground, 1).mean(0)
    if background is not None:
        heat = heat - minmax(background, 1).mean(0)
    return minmax(heat.clamp(min=0) if clamp else heat)


def points_of(heat: Tensor, size: tuple[int, int], *, down_sample: float = 0.5, threshold: float = 0.9,
              ) -> tuple[Tensor, Tensor]:
    """Points (n, 2) as (x, y) in pixels and labels (n,), 1 for the highest cells and 0 for as many lowest.

    Args:
        heat: (h, w) of the patches.
        size: (height, width) of the picture.
        down_sample: cells are the patches' sides divided by this.
        threshold: of the heat, for how many points there are; at most half of all cells.
    """
    grid = tuple(max(1, int(side / down_sample)) for side in heat.shape)
    cells = minmax(F.interpolate(heat[None, None].float(), grid, mode="bilinear", align_corners=False)).flatten()
    count = min(int((cells >= threshold).sum()), len(cells) // 2)
    order = cells.argsort(stable=True)
    chosen = torch.cat([order[len(order) - count:], order[:count]])
    height, width = size
    # exact integers: the floor of (cell + 1/2) * side / cells
    x = ((2 * (chosen % grid[1]) + 1) * width // (2 * grid[1])).clamp(max=width - 1)
    y = ((2 * (chosen // grid[1]) + 1) * height // (2 * grid[0])).clamp(max=height - 1)
    labels = torch.cat([torch.ones(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)])
    return torch.stack([x, y], 1).cpu(), labels


__all__ = ["heat_map", "minmax", "points_of", "similarities", "spatial_features"]
