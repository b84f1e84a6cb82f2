"""Putting a model into another mode for a while; everything comes back as it was, after an exception too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
def _restored(model: Any, parts: str, attribute: str) -> Iterator[list[Any]]:
    """The parts of a model, each of which has its own value of the attribute again after the block."""
    owners = list(getattr(model, parts)()) if hasattr(model, parts) else []
    former = [getattr(owner, attribute) for owner in owners]
    try:
        yield owners
    finally:
        for owner, value in zip(owners, former, strict=True):
            setattr(owner, attribute, value)


__all__ = ["evaluating", "frozen", "training", "with_gradients"]
