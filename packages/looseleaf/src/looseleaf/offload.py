"""Models whose weights accelerate keeps elsewhere while they rest, in memory or on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


def device_of(model: Any) -> Any:
    """The torch device that a module's input goes to; where its weights are offloaded, the one that it is run on."""
    for module in model.modules():
        for hook in _hooks(module):
            if getattr(hook, "offload", False) and hook.execution_device is not None:
                import torch

                at = hook.execution_device
                return torch.device("cuda", at) if isinstance(at, int) else torch.device(at)
    return next(model.parameters()).device


def offloaded(model: Any) -> dict[str, Callable[[], Any]]:
    """Name -> what reads the tensor, of the weights that are kept elsewhere."""
    found: dict[str, Callable[[], Any]] = {}
    for prefix, module in model.named_modules():
        for hook in _hooks(module):
            kept = getattr(hook, "weights_map", None) or ()
            for name in (*module._parameters, *module._buffers):
                if name in kept:
                    found[f"{prefix}.{name}".lstrip(".")] = partial(kept.__getitem__, name)
    return found


def _hooks(module: Any) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else [hook, *getattr(hook, "hooks", ())]


__all__ = ["device_of", "offloaded"]
