"""How sensitive a model's loss on the response is to each input token, and which tokens stand out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from looseleaf.errors import UnsupportedModelError
from looseleaf.modes import evaluating
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
    arguments: dict[str, Any] = {"attention_mask": attention.to(torch.int64)}
    base: Any = getattr(model, "get_base_model", lambda: model)()
    known = inspect.signature(base.forward).parameters
    if "use_cache" in known:
        arguments["use_cache"] = False
    if "position_ids" in known and not bool(attention[:, 0].all()):
        arguments["position_ids"] = (attention.to(torch.int64).cumsum(1) - 1).clamp(min=0)
    return arguments


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision widened; float32 and float64 as they are."""
    return values if values.dtype == torch.float64 else values.float()


def align(norms: Tensor, offsets: Tensor, onto: Tensor, mask: Tensor, white_space: Tensor | None = None) -> Tensor:
    """For each token of the student the largest norm among the teacher's tokens that share a character with it.

    The largest, because a token matters to the teacher when any part of it does [this project's rule; in the paper both
    have one tokenizer].

    Args:
        norms: (B, T) of the teacher's tokens.
        offsets: (B, T, 2) int, characters of the instruction that each of the teacher's tokens covers: first, and one
            beyond the last; (0, 0): none.
        onto: (B, L, 2), the same of the student's tokens.
        mask: (B, L) bool, tokens that need a value; the others get zero.
        white_space: (B, L) bool, tokens of ``mask`` that get zero where the teacher has no token; None: none.

    Raises:
        ValueError: another token of ``mask`` shares no character with any of the teacher's tokens, or other rows.
    """
    if len(norms) != len(onto):
        raise ValueError(f"the teacher's encoding has {len(norms)} rows, the student's {len(onto)}: both must hold the "
                         "same samples")
    offsets = offsets.to(norms.device)
    onto, mask = onto.to(norms.device), mask.to(norms.device)
    out = torch.zeros(mask.shape, dtype=norms.dtype, device=norms.device)
    for row in range(len(onto)):  # row by row: (L, T) fits where (B, L, T) may not
        starts = torch.maximum(onto[row, :, None, 0], offsets[row, None, :, 0])
        ends = torch.minimum(onto[row, :, None, 1], offsets[row, None, :, 1])
        shared = ends > starts
        lost = mask[row] & ~shared.any(1)
        if white_space is not None:
            lost &= ~white_space[row].to(lost.device)
        if bool(lost.any()):
            token = int(lost.nonzero()[0])
            raise ValueError(f"the tokenizers cannot be aligned: token {token} of row {row} (characters "
                             f"{onto[row, token].tolist()} of the instruction) shares no character with any of the "
                             "teacher's tokens; give encode the same texts for both")
        best = norms[row].expand_as(shared).masked_fill(~shared, -torch.inf).amax(1)
        out[row] = torch.where(mask[row] & shared.any(1), best, out[row])
    return out


def confounding(scores: Tensor, *, q: float = 0.10, cap: float = 0.5, tau: float | None = None,
                never: Tensor | None = None) -> Tensor:
    """The tokens of each row whose difference of sensitivity, teacher minus student, is lowest; (B, L) bool.

    The differences of a row (its finite scores) are brought to [0, 1] by their minimum and maximum. Of n of them the
    threshold is the one with index ``int(q * n)`` in ascending order, but at most ``cap``; what is at or below it is
    confounding [official code]. With ``tau`` the threshold is tau itself [paper]. Of equal differences the first are
    taken first, so that never more than ``int(q * n) + 1`` are. In a row whose differences are all equal, as of a
    single token, none stands out; in a row that would lose all its tokens none is taken [this project's rule].

    Args:
        scores: (B, L), floating point; +inf where a token may not be removed.
        q: quantile of each row, in [0, 1).
        cap: largest threshold, in [0, 1].
        tau: fixed threshold on the scaled differences, in [0, 1), in the place of ``q`` and ``cap``; None: not used.
        never: (B, L) bool, tokens that count in minimum, maximum and quantile but are not taken, such as white space
            [official code]; None: none.

    Raises:
        ValueError: scores of another shape or type, or with NaN or -inf.
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.ndim != 2:
        got = f"{scores.dtype} of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"scores: expected a floating-point tensor (B, L), got {got}")
    if bool((scores.isnan() | scores.isneginf()).any()):
        raise ValueError("scores: expected numbers, and +inf for what may not be removed, got NaN or -inf")
    scores = scores.detach()
    free = scores.isfinite()
    count = free.sum(1)
    scaled = min_max(scores.where(free, torch.zeros_like(scores)), free).masked_fill(~free, torch.inf)
    if tau is not None:
        gone = scaled <= tau
    else:
        order = scaled.sort(dim=1, stable=True).indices
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(
            order.shape[1], device=order.device).expand_as(order).contiguous())
        most = torch.tensor([int(q * n) + 1 for n in count.tolist()], device=scores.device)
        gone = (rank < most[:, None]) & (scaled <= cap)
    gone &= free
    low = scores.masked_fill(~free, torch.inf).amin(1)
    high = scores.masked_fill(~free, -torch.inf).amax(1)
    if never is not None:
        gone &= ~never.to(gone.device)
    return gone & ((gone.sum(1) < count) & (high > low))[:, None]


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
        raise UnsupportedModelError(f"the {name}: expected a model with input embeddings (get_input_embeddings(), as "
                                    f"causal language models of transformers have), got {type(model).__name__}")
    size = getattr(embedding, "num_embeddings", None)
    if size is not None and (int(ids.max()) >= size or int(ids.min()) < 0):
        raise ValueError(f"token ids from {int(ids.min())} to {int(ids.max())}, but the {name} knows 0 to {size - 1}: "
                         "the batch was made by another tokenizer. Where teacher and student have different ones, give "
                         "encode both (teacher_tokenizer=...)")
    return embedding
