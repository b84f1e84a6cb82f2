"""How sensitive a model's loss on the response is to each input token."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from looseleaf.errors import UnsupportedModelError
from looseleaf_leaf.batch import checked

FP16_SCALES = (2.0 ** 16, 2.0 ** 8, 1.0)
"""Factors on the loss of float16 models, tried in turn: small gradients would underflow, large ones overflow."""


def input_gradient_norms(model: nn.Module, batch: Mapping[str, Any], name: str = "model") -> Tensor:
    """The L2 norm of the gradient of each row's loss with respect to each input embedding.

    The loss of a row is the mean cross-entropy of its response tokens; rows are added up, so that a row's norms do not
    depend on the others. The model runs in evaluation mode and is left as it was; its parameters get no gradient.

    Args:
        model: a causal language model of transformers, or any with ``get_input_embeddings`` that takes
            ``inputs_embeds`` and returns ``logits``; also under PEFT.
        batch: see :data:`looseleaf_leaf.batch.KEYS`.
        name: what error messages call the model.

    Returns:
        (B, L), float32 (float64 for a float64 model), zero on padding. [section 3.1 of the paper]

    Raises:
        ValueError: bad batch; token ids beyond the model's vocabulary; gradients that are NaN or infinite.
        UnsupportedModelError: no input embeddings.
    """
    checked(batch)
    device = next(model.parameters()).device
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        # clones: a tensor made in inference mode cannot take part in a backward pass
        full = checked({k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()})
        embedding = _embedding(model, full["input_ids"], name)
        attention, response = full["attention_mask"].to(device), full["response_mask"].to(device)
        embedded = embedding(full["input_ids"].to(device)).detach().requires_grad_(True)
        logits = model(inputs_embeds=embedded, **attending(model, attention)).logits
        # only the response's logits become float32: those of a long prompt would be the largest tensor of all
        losses = functional.cross_entropy(at_least_float32(logits[:, :-1][response[:, 1:]]),
                                          full["labels"].to(device)[response], reduction="none")
        gradient = _gradient((losses / response.sum(1)[response.nonzero()[:, 0]]).sum(), embedded)
    norms = at_least_float32(gradient).norm(dim=-1).masked_fill(~attention, 0.0)
    wrong = (~norms.isfinite()).any(1)
    if bool(wrong.any()):
        raise ValueError(f"the gradients of the {name} are NaN or infinite in rows "
                         f"{wrong.nonzero().flatten().tolist()[:5]}: look for broken weights, and load a model that "
                         "overflows in float16 as bfloat16 or float32")
    return norms.detach()


def min_max(values: Tensor, mask: Tensor) -> Tensor:
    """Each row of ``values`` (B, L) brought to [0, 1] over the entries of ``mask`` (B, L); a row whose entries are all
    equal is left as it is [official code]. Other entries are zero."""
    low = values.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = values.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    spread = high > low
    scaled = torch.where(spread, (values - low) / torch.where(spread, high - low, 1.0), values)
    return scaled.masked_fill(~mask, 0.0)


def attending(model: nn.Module, attention: Tensor) -> dict[str, Any]:
    """Arguments with which a padded row (on either side) is read like the row alone."""
    made: dict[str, Any] = {"attention_mask": attention.to(torch.int64)}
    base: Any = getattr(model, "get_base_model", lambda: model)()
    known = inspect.signature(base.forward).parameters
    if "use_cache" in known:
        made["use_cache"] = False
    if "position_ids" in known and not bool(attention[:, 0].all()):
        made["position_ids"] = (attention.to(torch.int64).cumsum(1) - 1).clamp(min=0)
    return made


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision widened; float32 and float64 as they are."""
    return values if values.dtype == torch.float64 else values.float()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _gradient(loss: Tensor, embedded: Tensor) -> Tensor:
    scales = FP16_SCALES if embedded.dtype == torch.float16 else (1.0,)
    for scale in scales:
        last = scale == scales[-1]
        (gradient,) = torch.autograd.grad(loss * scale, embedded, retain_graph=not last)
        if last or bool(gradient.isfinite().all()):
            break
    return gradient.float() / scale if embedded.dtype == torch.float16 else gradient


def _embedding(model: nn.Module, ids: Tensor, name: str) -> nn.Module:
    getter = getattr(model, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    if not isinstance(embedding, nn.Module):
        raise UnsupportedModelError(f"the {name} ({type(model).__name__}) has no input embeddings: allowed are models "
                                    "with get_input_embeddings(), as causal language models of transformers have")
    size = getattr(embedding, "num_embeddings", None)
    if size is not None and (int(ids.max()) >= size or int(ids.min()) < 0):
        raise ValueError(f"token ids from {int(ids.min())} to {int(ids.max())}, but the {name} knows 0 to {size - 1}: "
                         "the batch was made by another tokenizer. Where teacher and student have different ones, give "
                         "encode both (teacher_tokenizer=...)")
    return embedding
