"""Masks for a model in training: passed in at each forward, so that no training code changes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf.errors import UnsupportedModelError
from looseleaf.unwrap import unwrapped
from looseleaf_colormae.pruner import ColorMAE, MaskIds, patch_grid


@dataclasses.dataclass
class Masking:
    """The masks that an attached model gets.

    Attributes:
        method: makes them; set ``method.epoch`` where it has a schedule, ``method.step`` to go on with a run.
        last: those of the last forward with masks; of a model that takes ``bool_masked_pos``, its ``mask`` is that.
        grid: patches of the last forward.
        count: forwards with masks so far.
    """

    method: ColorMAE
    last: MaskIds | None = None
    grid: tuple[int, ...] = ()
    count: int = 0

    @torch.compiler.disable
    def next(self, model: Any, pixels: Tensor, block: int = 1) -> MaskIds:
        """Draw the masks of one forward; arguments as :func:`attach_masking`."""
        self.grid = patch_grid(model, pixels)
        if block == 1:
            self.last = self.method.ids(len(pixels), self.grid, pixels.device)
        else:
            mask = self.method.bool_masked_pos(len(pixels), self.grid, pixels.device, block=block)
            order = mask.long().argsort(dim=1, stable=True)
            self.last = MaskIds(order[:, :int((~mask[0]).sum())], order.argsort(1), mask.float())
        self.count += 1
        return self.last


@contextmanager
def attach_masking(model: nn.Module, method: ColorMAE, *, block: int = 1, always: bool = False) -> Iterator[Masking]:
    """Pass the masks of ``method`` to ``model`` at each forward in training, until the block ends.

    - ViTMAE (``noise``): the patches of the method are kept; ``config.mask_ratio`` must keep as many.
    - ViT, BEiT, DINOv2, Swin, VideoMAE (``bool_masked_pos``). ``labels`` of BEiT may be (B, N): those of the masked
      patches are taken.
    - timm's vision transformers (``patch_drop``): the encoder sees the kept patches alone, behind its prefix tokens,
      as an MAE's does; ``masking.last`` has what a decoder needs.

    A mask that the caller passes himself is left alone. The model may be wrapped (PEFT, DDP, ``torch.compile``); the
    Trainer of transformers works as it is.

    Args:
        model: what is called in training.
        method: makes the masks.
        block: mask squares of so many patches a side, see :meth:`ColorMAE.bool_masked_pos`.
        always: in evaluation mode as well.

    Raises:
        UnsupportedModelError: a model that takes no mask.
        ValueError: a model made without its mask token; ``block`` with a model that takes no ``bool_masked_pos``; at a
            forward: see :meth:`ColorMAE.noise`, or a ``mask_ratio`` of another count.
    """
    inner = unwrapped(model)
    takes = inspect.signature(inner.forward).parameters if isinstance(inner, nn.Module) else {}
    name = next((n for n in ("noise", "bool_masked_pos") if n in takes), None)
    patch_drop = getattr(inner, "patch_drop", None)
    if name is None and not isinstance(patch_drop, nn.Module):
        raise UnsupportedModelError(f"{type(inner).__name__}: expected a model that takes noise or bool_masked_pos, or "
                                    "one of timm with patch_drop, got none of these: use ColorMAE.ids, keep_mask or "
                                    "index_lists in your own model")
    if block != 1 and name != "bool_masked_pos":
        raise ValueError(f"block: expected 1 for {type(inner).__name__}, which takes no bool_masked_pos, got {block}")
    if name == "bool_masked_pos" and any(getattr(module, "mask_token", module) is None for module in inner.modules()):
        raise ValueError(f"{type(inner).__name__}: expected a model with a mask token, got none: make it with "
                         "config.use_mask_token=True")
    masking = Masking(method)

    def pass_in(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pixels = kwargs.get("pixel_values", args[0] if args else None)
        given = kwargs.get(str(name)) is not None or len(args) > list(takes).index(str(name))
        if given or pixels is None or not (module.training or always):
            return None
        ids = masking.next(inner, pixels, block)
        if name == "noise":
            _check_ratio(inner, ids)
            return args, {**kwargs, "noise": ids.ids_restore.to(torch.float32)}
        mask, labels = ids.mask.bool(), kwargs.get("labels")
        if isinstance(labels, Tensor) and labels.shape == mask.shape and "Beit" in type(inner).__name__:
            kwargs = {**kwargs, "labels": labels[mask.to(labels.device)]}
        return args, {**kwargs, "bool_masked_pos": mask}

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        if inner.training or always:
            masking.next(inner, args[0])

    def drop(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if masking.last is None or not (inner.training or always):
            return None
        keep, prefix = masking.last.ids_keep, int(inner.num_prefix_tokens)
        tokens = args[0][:, prefix:]
        kept = tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([args[0][:, :prefix], kept], 1)
        return (tokens, keep) if isinstance(output, tuple) else tokens

    with ExitStack() as hooks:
        if name is not None:
            hooks.enter_context(_removed(model.register_forward_pre_hook(pass_in, with_kwargs=True)))
        else:
            hooks.enter_context(_removed(inner.patch_embed.register_forward_pre_hook(see)))
            hooks.enter_context(_removed(patch_drop.register_forward_hook(drop)))  # type: ignore[union-attr]
        yield masking


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _check_ratio(model: Any, ids: MaskIds) -> None:
    ratio, patches = float(model.config.mask_ratio), ids.mask.shape[1]
    if int(patches * (1 - ratio)) != ids.ids_keep.shape[1]:
        raise ValueError(f"config.mask_ratio: expected a ratio that keeps {ids.ids_keep.shape[1]} of {patches} "
                         f"patches, as ColorMAE does, got {ratio}: make it and ColorMAE.ratio equal")


__all__ = ["Masking", "attach_masking"]
