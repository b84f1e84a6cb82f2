"""What is kept for the backward: less of an MLP, nothing of a norm, and never the logits of a whole text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf.errors import UnsupportedModelError

GATED = ("gate_proj", "up_proj", "down_proj")
PLAIN = (("up_proj", "down_proj"), ("fc1", "fc2"), ("c_fc", "c_proj"))
ACTIVATIONS = ("act_fn", "activation_fn", "act")


def mlp_parts(mlp: nn.Module) -> tuple[nn.Linear | None, nn.Linear, nn.Linear, Callable[[Tensor], Tensor]]:
    """Gate (None in a plain MLP), up, down and activation of an MLP, all frozen.

    Raises:
        UnsupportedModelError: it is none of these, or its layers are no plain ``nn.Linear``.
        ValueError: a weight of it is trained: its gradient needs all that LeMo drops.
    """
    trained = [name for name, parameter in mlp.named_parameters() if parameter.requires_grad]
    if trained:
        raise ValueError(f"mlp_sparsity: expected an MLP whose weights are frozen, got {type(mlp).__name__} with "
                         f"{trained[0]} being trained: put adapters on the attention alone (and on the model before "
                         "LeMo), or set mlp_sparsity=0")
    found = [GATED] if hasattr(mlp, "gate_proj") else [pair for pair in PLAIN if hasattr(mlp, pair[0])]
    activation = next((getattr(mlp, name) for name in ACTIVATIONS if hasattr(mlp, name)), None)
    linears = [getattr(mlp, name, None) for name in found[0]] if found else []
    dropped = any(isinstance(m, nn.Dropout) and m.p > 0 for m in mlp.modules()) or \
        float(getattr(mlp, "residual_dropout", 0)) > 0
    if not linears or activation is None or dropped or any(type(linear) is not nn.Linear for linear in linears):
        raise UnsupportedModelError(f"{type(mlp).__name__}: expected an MLP of nn.Linear layers named "
                                    f"{', '.join(GATED)} or {' or '.join(map(', '.join, PLAIN))}, an activation and no "
                                    "dropout, got another: set mlp_sparsity=0")
    return (None, *linears, activation) if len(linears) == 2 else (*linears, activation)  # type: ignore[return-value]


def cut_mlp(x: Tensor, parts: Any, sparsity: float, valid: Tensor | None = None) -> Tensor:
    """The output of an MLP, exact, with a backward through some of its columns alone. [section 5]

    Kept are, item by item, the ``round((1 - sparsity) * columns)`` columns with the largest norm of the gate after its
    activation plus norm of ``up``, over the item's tokens; of a plain MLP those with the largest norm after the
    activation [ours]. The gradient is that of the MLP cut to these columns: biased.

    Args:
        x: (B, L, H).
        parts: of :func:`mlp_parts`.
        sparsity: fraction of the columns that is dropped.
        valid: (B, L) bool, tokens that norms are taken over; None: all.
    """
    return _CutMLP.apply(x, valid, parts, sparsity)  # type: ignore[no-any-return, no-untyped-call]


class _CutMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, valid: Tensor | None, parts: Any, sparsity: float) -> Tensor:  # type: ignore[override]
        gate, up, down, activation = parts
        u = up(x)
        g = u if gate is None else gate(x)
        a = activation(g)
        norms = _norm(a, valid) if gate is None else _norm(a, valid) + _norm(u, valid)
        out: Tensor = down(a if gate is None else a * u)
        del a
        count = max(1, round((1 - sparsity) * norms.shape[1]))
        columns = norms.topk(count, dim=1).indices.sort(1).values
        index = columns[:, None].expand(-1, x.shape[1], -1)
        ctx.save_for_backward(columns, g.gather(2, index), None if gate is None else u.gather(2, index))
        ctx.parts, ctx.dtype = parts, x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        columns, g, u = ctx.saved_tensors
        gate, up, down, activation = ctx.parts
        out = []
        for b, own in enumerate(columns):
            inner = grad[b].to(g.dtype) @ down.weight[:, own].to(g.dtype)
            with torch.enable_grad():
                leaves = [each[b].detach().requires_grad_() for each in (g, u) if each is not None]
                h = activation(leaves[0]) * leaves[1] if len(leaves) == 2 else activation(leaves[0])
            slopes = torch.autograd.grad(h, leaves, inner)
            linears = (up,) if gate is None else (gate, up)
            out.append(sum(slope @ linear.weight[own].to(g.dtype)
                           for slope, linear in zip(slopes, linears, strict=True)))
        return torch.stack(out).to(ctx.dtype), None, None, None


def _norm(values: Tensor, valid: Tensor | None) -> Tensor:
    """(B, columns) norm over tokens."""
    if valid is not None:
        values = values.masked_fill(~valid[..., None], 0)
    return torch.linalg.vector_norm(values, dim=1, dtype=torch.promote_types(values.dtype, torch.float32))


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
    """``function(x)``, of which nothing but ``x`` is kept for the backward; it is run again there.

    Args:
        function: without randomness.
        parameters: what else it depends on and may need a gradient.
    """
    return _Recomputed.apply(function, x, *parameters)  # type: ignore[no-any-return, no-untyped-call]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Any, x: Tensor, *parameters: Tensor) -> Tensor:  # type: ignore[override]
        ctx.function, ctx.autocast = function, _autocast(x.device.type)
        ctx.save_for_backward(x, *parameters)
        out: Tensor = function(x)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad(), ctx.autocast():
            leaf = x.detach().requires_grad_(ctx.needs_input_grad[1])
            out = ctx.function(leaf)
        wanted = [t for t, needed in zip((leaf, *parameters), ctx.needs_input_grad[1:], strict=True) if needed]
        grads = iter(torch.autograd.grad(out, wanted, grad))
        return None, *(next(grads) if needed else None for needed in ctx.needs_input_grad[1:])


def _autocast(kind: str) -> Callable[[], AbstractContextManager[Any]]:
    """Makes a context with the autocast of now."""
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)


def chunked_loss(hidden: Tensor, head: nn.Module, labels: Tensor, chunk: int, *, softcap: float | None = None,
                 items: Tensor | int | None = None) -> Tensor:
    """The cross-entropy of the next token, some tokens at a time, logits computed again in the backward. [section 6]

    The mean over the labels that are not -100, as transformers has it; the official code divides by L.

    Args:
        hidden: (B, L, H), what goes into ``head``.
        head: the output embeddings.
        labels: (B, L), not shifted.
        chunk: tokens at a time.
        softcap: of the logits (Gemma 2).
        items: what the sum is divided by; None: the number of labels.
    """
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten().to(hidden.device)
    parameters = [p for p in head.parameters() if p.requires_grad]
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for part, target in zip(hidden.flatten(0, 1).split(chunk), targets.split(chunk), strict=True):
        def loss(states: Tensor, target: Tensor = target) -> Tensor:
            logits = head(states)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logits = softcap * torch.tanh(logits / softcap) if softcap else logits
            return F.cross_entropy(logits, target, ignore_index=-100, reduction="sum")

        total = total + recomputed(loss, part, *parameters)
    return total / ((targets != -100).sum() if items is None else items)


__all__ = ["chunked_loss", "cut_mlp", "mlp_parts", "recomputed"]
