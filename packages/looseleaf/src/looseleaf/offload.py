"""Weights that accelerate keeps elsewhere, in memory or on disk, while a model rests."""

from collections.abc import Callable
from functools import partial
from typing import Any


def hooks(module: Any) -> list[Any]:
    """The hooks by which accelerate moves what a module needs."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else [hook, *getattr(hook, "hooks", ())]


def execution_device(module: Any) -> str | None:
    """Where accelerate runs a module whose weights it keeps elsewhere; None where it does not."""
    at = next((h.execution_device for h in hooks(module) if getattr(h, "offload", False)), None)
    return None if at is None else f"cuda:{at}" if isinstance(at, int) else str(at)


def offloaded(model: Any) -> dict[str, Callable[[], Any]]:
    """Name -> what reads the tensor, of the weights that are kept elsewhere."""
    kept = [(prefix, name, hook.weights_map) for prefix, module in model.named_modules() for hook in hooks(module)
            if getattr(hook, "weights_map", None) is not None for name in (*module._parameters, *module._buffers)]
    return {f"{prefix}.{name}".lstrip("."): partial(held.__getitem__, name) for prefix, name, held in kept
            if name in held}
