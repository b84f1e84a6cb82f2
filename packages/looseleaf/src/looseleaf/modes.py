"""Putting a model into another mode for a while; everything comes back as it was, after an exception too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode for the ``with`` block; afterwards every submodule has its own mode again.

    A model may well be trained with some parts in evaluation mode, such as a frozen batch norm.

    Args:
        model: a torch module; anything else (a function, a pipeline without modes) is left alone.
    """
    with _remembering(model):
        if hasattr(model, "eval") and hasattr(model, "modules"):
            model.eval()
        yield


@contextmanager
def training(model: Any) -> Iterator[None]:
    """Training mode for the ``with`` block; afterwards every submodule has its own mode again."""
    with _remembering(model):
        model.train()
        yield


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No parameter of ``model`` collects a gradient in the ``with`` block; each ``requires_grad`` comes back."""
    parameters = [(p, p.requires_grad) for p in model.parameters()] if hasattr(model, "parameters") else []
    try:
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, former in parameters:
            parameter.requires_grad_(former)


@contextmanager
def _remembering(model: Any) -> Iterator[None]:
    modes = [(m, m.training) for m in model.modules()] if hasattr(model, "modules") else []
    try:
        yield
    finally:
        for module, former in modes:  # not train(mode): that would give every submodule the mode of the whole
            module.training = former


__all__ = ["evaluating", "frozen", "training"]
