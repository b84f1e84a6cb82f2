"""One call of attention, and the interface that an attention plugin implements."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from looseleaf.plugin import Plugin

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from looseleaf.attention.mask import LazyMask

Phase = Literal["prefill", "decode", "encode"]


@dataclasses.dataclass
class AttentionCall:
    """Everything a backend may look at in one call of one layer.

    The core removes padding before a backend is called: the queries and keys of a batch item are a prefix
    of the tensors, as long as ``query_lengths`` and ``key_lengths`` say, whatever side the batch was padded on.

    Attributes:
        query: (B, Hq, Lq, D).
        key, value: (B, Hkv, Lk, D); Hkv divides Hq and is not expanded.
        scale: factor of the scores before the softmax.
        is_causal: query row i of a batch item sees keys 0 .. i + (key length - query length) of that item.
        query_lengths, key_lengths: (B,) int64 on the tensors' device, or None where every row is valid.
            What lies beyond may be anything, NaN too; the output rows there are ignored.
        mask: what neither causality nor lengths say: None, bool (True: attend) or additive,
            broadcastable to (B, Hq, Lq, Lk), or a :class:`~looseleaf.attention.mask.LazyMask` that makes rows of it.
            A backend that cannot honour a mask must use :meth:`fall_back`.
        layer: index of the layer in its model.
        step: denoising step for diffusion models, from 0, else None. One smaller than the last begins a new run.
        steps: number of denoising steps of a run, or None where nobody said.
        phase: ``prefill`` (causal, Lq > 1), ``decode`` (Lq == 1 with a longer cache) or ``encode``.
        state: namespace kept per attached model and layer; cleared by ``attached.reset()``.
        module: the attention module, for backends that calibrate per module; None outside a model.
        record: call it as ``record(name=value, ...)`` to put numbers or short texts in ``attached.report()``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    is_causal: bool = True
    query_lengths: Tensor | None = None
    key_lengths: Tensor | None = None
    mask: Tensor | LazyMask | None = None
    layer: int = 0
    step: int | None = None
    steps: int | None = None
    phase: Phase = "prefill"
    state: SimpleNamespace = dataclasses.field(default_factory=SimpleNamespace)
    module: Any = None
    record: Callable[..., None] = lambda **values: None

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """(B, Hq, Hkv, Lq, Lk, D)."""
        b, hq, lq, d = self.query.shape
        return b, hq, self.key.shape[1], lq, self.key.shape[2], d

    def dense(self) -> Tensor:
        """Exact attention, (B, Hq, Lq, D); rows beyond ``query_lengths`` and rows without any key are zero."""
        from looseleaf.attention.dense import dense_attention

        return dense_attention(self)

    def fall_back(self, reason: str) -> Tensor:
        """Exact attention, counted in the report under ``reason``. Use it where the method does not apply."""
        self.record(fallback=reason)
        return self.dense()


@dataclasses.dataclass
class AttentionBackend(Plugin):
    """A way to compute attention.

    Implement :meth:`attend`. Decode steps, inputs below a method's minimum, and unsupported masks are the
    backend's to send to ``call.fall_back(reason)``.
    """

    kind: ClassVar[str] = "attention"
    changes: ClassVar[Phase] = "prefill"
    """The calls that the method is for: ``prefill`` (causal) or ``encode`` (bidirectional: encoders, denoisers)."""

    @abstractmethod
    def attend(self, call: AttentionCall) -> Tensor:
        """The attention output, (B, Hq, Lq, D), in the dtype of the query."""

    def calibrate(self, model: torch.nn.Module, batches: Any) -> None:
        """Learn what the method needs. The default needs nothing.

        Args:
            model: what :func:`looseleaf.attach` takes.
            batches: dicts of model inputs; for methods that change ``encode`` calls also a function that runs the
                model, given what ``attach`` returned, because a denoising run is a loop.
        """

    def save(self, path: str | Path) -> None:
        """Write what :meth:`calibrate` learned. The default has nothing to write and raises."""
        raise NotImplementedError(f"{type(self).__name__} is not calibrated: there is nothing to save")

    def load(self, path: str | Path) -> None:
        """Read what :meth:`save` wrote."""
        raise NotImplementedError(f"{type(self).__name__} is not calibrated: there is nothing to load")

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                 dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
                 enable_gqa: bool = False) -> Tensor:
        """The same signature and meaning as ``torch.nn.functional.scaled_dot_product_attention``."""
        if dropout_p:
            raise ValueError(f"dropout_p={dropout_p}: {type(self).__name__} has no dropout, allowed is 0.0")
        if key.shape[1] != query.shape[1] and not enable_gqa:
            raise ValueError(f"query has {query.shape[1]} heads and key {key.shape[1]}: "
                             "pass enable_gqa=True for grouped-query attention")
        if is_causal and query.shape[-2] != key.shape[-2]:
            raise ValueError("is_causal with Lq != Lk is ambiguous here (torch aligns it to the top left): "
                             "build an AttentionCall, which aligns to the bottom right as caches do")
        return self.attend(AttentionCall(
            query, key, value, scale=query.shape[-1] ** -0.5 if scale is None else scale,
            is_causal=is_causal, mask=attn_mask, phase="prefill" if is_causal else "encode"))
