"""What a probe is run on, taken apart: a model and what prepares its inputs."""

from __future__ import annotations

from typing import Any

from torch import nn

PROCESSORS = ("processor", "tokenizer", "image_processor", "feature_extractor")
"""Attributes of a pipeline that prepare inputs; ``processor`` stands for several others where a pipeline has one."""


def parts(subject: Any, needs: str = "") -> tuple[nn.Module, Any]:
    """The model of a subject, and its processor or None.

    Args:
        subject: a torch module; a ``(model, processor)`` pair, whose processor is a tokenizer, an image processor or a
            processor of both; or anything with a ``model`` and one of :data:`PROCESSORS`, such as a pipeline of
            transformers or a ``looseleaf_text.LocalModel``.
        needs: the processor that the probe cannot do without, in words, such as ``"tokenizer"``.

    Raises:
        TypeError: the subject is none of these.
        ValueError: it has no processor, and one is needed.
    """
    model, processor = subject, None
    if isinstance(subject, (tuple, list)) and len(subject) == 2:
        model, processor = subject
    elif not isinstance(subject, nn.Module) and isinstance(getattr(subject, "model", None), nn.Module):
        model = subject.model
        processor = next((p for name in PROCESSORS if (p := getattr(subject, name, None)) is not None), None)
    if not isinstance(model, nn.Module):
        got = f"a pair of {type(model).__name__} and {type(processor).__name__}" if model is not subject \
            else type(subject).__name__
        raise TypeError(f"subject: expected a model, a (model, {needs or 'processor'}) pair, a pipeline or a "
                        f"LocalModel, got {got}")
    if needs and processor is None:
        raise ValueError(f"subject: expected a (model, {needs}) pair, got {type(model).__name__} alone: this probe "
                         f"needs the model's {needs}")
    return model, processor


__all__ = ["PROCESSORS", "parts"]
