"""Another mode or random state for a while; everything comes back as it was, after an exception too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode for the ``with`` block; anything but a torch module is left alone.

    Afterwards every submodule has its own mode again: a model may well be trained with some parts in evaluation mode,
    such as a frozen batch norm.
    """
    with _restored(model, "modules", "training"):
        if hasattr(model, "eval") and hasattr(model, "modules"):
            model.eval()
        yield


@contextmanager
def training(model: Any) -> Iterator[None]:
    """Training mode for the ``with`` block; afterwards every submodule has its own mode again."""
    with _restored(model, "modules", "training"):
        model.train()
        yield


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No parameter of ``model`` collects a gradient in the ``with`` block; each ``requires_grad`` comes back."""
    with _restored(model, "parameters", "requires_grad") as parameters:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield


@contextmanager
def with_gradients() -> Iterator[None]:
    """Gradients are recorded in the ``with`` block, whatever is switched off around it."""
    import torch

    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def own_random_state(seed: int | None = None) -> Iterator[None]:
    """The global generators of Python, NumPy and torch, ``seed``-ed for the block, are as they were after it."""
    import random

    import numpy as np
    import torch

    with ExitStack() as undo:
        undo.callback(random.setstate, random.getstate())
        undo.callback(np.random.set_state, np.random.get_state())
        undo.callback(torch.set_rng_state, torch.get_rng_state())
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            undo.callback(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2 ** 32)
            torch.manual_seed(seed)
        yield


@contextmanager
def _restored(model: Any, parts: str, attribute: str) -> Iterator[list[Any]]:
    """The parts of a model, each of which has its own value of the attribute again after the block."""
    owners = list(getattr(model, parts)()) if hasattr(model, parts) else []
    former = [getattr(owner, attribute) for owner in owners]
    try:
        yield owners
    finally:
        for owner, value in zip(owners, former, strict=True):
            setattr(owner, attribute, value)


__all__ = ["evaluating", "frozen", "own_random_state", "training", "with_gradients"]
