"""One call of attention, and the interface that an attention plugin implements."""
# ruff: noqa: F722 (shapes)

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from looseleaf.attention.dense import LazyMask, dense_attention
from looseleaf.files import load_tensors, save_tensors
from looseleaf.plugin import Plugin

Phase = Literal["prefill", "decode", "bidirectional"]
SCORE_CHANGES = ("softcap", "s_aux", "position_bias", "dropout")
"""What :attr:`AttentionCall.score_changes` may hold."""
FORMAT = "looseleaf.attention/1"


@dataclasses.dataclass
class AttentionCall:
    """Everything a backend may look at in one call of one layer.

    The core removes padding before a backend is called: the queries and keys of a batch item are a prefix
    of the tensors, as long as :meth:`lengths` says, whatever side the batch was padded on.

    Attributes:
        query: (B, Hq, Lq, D).
        key, value: (B, Hkv, Lk, D); Hkv divides Hq and is not expanded.
        scale: factor of the scores before the softmax.
        is_causal: query row i of a batch item sees keys 0 .. i + (key length - query length) of that item.
        query_lengths, key_lengths: (B,) int64 on the tensors' device, or None where every row is valid.
            What lies beyond may be anything, NaN too; the output rows there are ignored.
        mask: what neither causality nor lengths say: None, bool (True: attend) or additive,
            broadcastable to (B, Hq, Lq, Lk), or a :class:`~looseleaf.attention.dense.LazyMask` that makes rows of it.
            A backend that cannot honour a mask must use :meth:`fall_back`.
        layer: index of the layer in its model.
        layers: how many attention layers the model has.
        step: denoising step for diffusion models, from 0, else None. One smaller than the last begins a new run.
        steps: number of denoising steps of a run, or None where it is unknown.
        phase: ``prefill`` (causal, no keys before the first query), ``decode`` (causal, after a cache: one query, or
            several that are verified in speculative decoding) or ``bidirectional``.
        is_cross: the keys come from another sequence than the queries.
        context: what the caller put into ``attached.context``, name -> (B, Lq) or (B, Lk), moved as the padding was.
        score_changes: what the layer does to its scores or probabilities besides scale and mask, by name:
            ``softcap`` (float), ``s_aux`` (Hq,) attention sinks, ``position_bias`` broadcastable to (B, Hq, Lq, Lk),
            ``dropout`` (probability, in training). Only what the backend's class lists in ``score_changes`` comes.
        state: namespace kept per attached model and layer; cleared by ``attached.reset()``.
        module: the attention module, for backends that calibrate per module; None outside a model.
        record: call it as ``record(name=value, ...)`` to put numbers or short texts in ``attached.report()``.
    """

    query: Float[Tensor, "batch heads queries head_dim"]
    key: Float[Tensor, "batch kv_heads keys head_dim"]
    value: Float[Tensor, "batch kv_heads keys value_dim"]
    scale: float
    is_causal: bool = True
    query_lengths: Int64[Tensor, " batch"] | None = None
    key_lengths: Int64[Tensor, " batch"] | None = None
    mask: Tensor | LazyMask | None = None
    layer: int = 0
    step: int | None = None
    steps: int | None = None
    phase: Phase = "prefill"
    layers: int = 1
    is_cross: bool = False
    context: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    score_changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    state: SimpleNamespace = dataclasses.field(default_factory=SimpleNamespace)
    module: Any = None
    record: Callable[..., None] = lambda **values: None

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """(B, Hq, Hkv, Lq, Lk, D)."""
        b, hq, lq, d = self.query.shape
        return b, hq, self.key.shape[1], lq, self.key.shape[2], d

    def lengths(self) -> tuple[Int64[Tensor, " batch"], Int64[Tensor, " batch"]]:
        """Valid queries and valid keys of each batch item, int64 on the tensors' device."""
        batch, _, _, *full, _ = self.shape
        queries, keys = (
            torch.full((batch,), count, dtype=torch.int64, device=self.query.device) if lengths is None else lengths
            for lengths, count in zip((self.query_lengths, self.key_lengths), full))
        return queries, keys

    def dense(self) -> Float[Tensor, "batch heads queries value_dim"]:
        """Exact attention; rows beyond the query lengths and rows without any key are zero."""
        return dense_attention(self)

    def fall_back(self, reason: str) -> Float[Tensor, "batch heads queries value_dim"]:
        """Exact attention, counted in the report under ``reason``. Use it where the method does not apply."""
        self.record(fallback=reason)
        return self.dense()


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of the layers that a backend is attached to; None: unknown, or not the same in all of them.

    Attributes:
        layers: how many attention layers the model has.
        heads, kv_heads: query heads and key heads of a layer.
        head_dim: size of a head.
        grid: frames, height and width of the tokens of an image or video model; tokens besides the grid not counted.
    """

    layers: int
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    grid: tuple[int, int, int] | None = None


@dataclasses.dataclass
class AttentionBackend(Plugin):
    """A way to compute attention.

    Implement :meth:`attend`. Inputs below a method's minimum and masks that it does not know are the backend's to
    send to ``call.fall_back(reason)``; the phases and score changes that its class does not list never reach it.

    Attributes:
        modules: what a learned method trains, layer -> module; set it in :meth:`prepare`. Under ``attach`` they are
            part of the model: on its device, in its dtype and among ``model.parameters()``. Afterwards they are the
            backend's alone again.
    """

    kind: ClassVar[str] = "attention"
    phases: ClassVar[frozenset[Phase]] = frozenset({"prefill"})
    """The calls that the method is for; see :attr:`AttentionCall.phase`. The core computes the others exactly."""
    score_changes: ClassVar[frozenset[str]] = frozenset()
    """The names of :data:`SCORE_CHANGES` that :meth:`attend` honours. A layer with another one stays exact."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.modules: dict[int, nn.Module] = {}
        self._loaded: dict[int, dict[str, Tensor]] = {}

    @abstractmethod
    def attend(self, call: AttentionCall) -> Float[Tensor, "batch heads queries value_dim"]:
        """The attention output, in the dtype of the query."""

    def prepare(self, model: Any, geometry: Geometry) -> None:
        """Called by :func:`looseleaf.attach` before the first call, such as to make :attr:`modules`.

        ``model`` is without wrappers such as PEFT's, ``geometry`` of the layers that the backend is attached to.
        """

    def calibrate(self, model: nn.Module, batches: Any) -> None:
        """Learn what the method needs. The default needs nothing.

        ``model`` is what :func:`looseleaf.attach` takes. ``batches`` are dicts of model inputs; for bidirectional
        methods also a function that runs the model, given what ``attach`` returned: a denoising run is a loop.
        """

    def save(self, path: str | Path) -> None:
        """Write what was learned, by default the weights of :attr:`modules`, as safetensors; ValueError: nothing."""
        if not self.modules:
            raise ValueError(f"{type(self).__name__}.save: expected something learned, got no modules: attach it first")
        tensors = {f"{layer}.{name}": tensor for layer, module in self.modules.items()
                   for name, tensor in module.state_dict().items()}
        save_tensors(path, tensors, {"backend": type(self).__name__}, format=FORMAT)

    def load(self, path: str | Path) -> None:
        """Read what :meth:`save` wrote. Where :attr:`modules` are not made yet, ``attach`` fills them."""
        tensors, info = load_tensors(path, format=FORMAT)
        if info.get("backend") != type(self).__name__:
            raise ValueError(f"{path}: expected modules of {type(self).__name__}, got those of {info.get('backend')}")
        self._loaded = {}
        for name, tensor in tensors.items():
            layer, _, rest = name.partition(".")
            self._loaded.setdefault(int(layer), {})[rest] = tensor
        self.fill()

    def fill(self) -> None:
        """Put loaded weights into :attr:`modules`; those without a module wait for one."""
        for layer in self._loaded.keys() & self.modules.keys():
            self.modules[layer].load_state_dict(self._loaded.pop(layer))

    def compute(self, call: AttentionCall) -> Float[Tensor, "batch heads queries value_dim"]:
        """:meth:`attend` where the method is for such a call; else exact attention, counted."""
        if call.phase not in self.phases:
            return call.fall_back(f"a {call.phase} call")
        if unknown := [name for name in call.score_changes if name not in self.score_changes]:
            return call.fall_back(f"scores changed by {', '.join(unknown)}")
        head_dim, value_dim = call.query.shape[-1], call.value.shape[-1]
        if head_dim == value_dim:
            return self.attend(call)
        # Latent attention (MLA) has keys and values of different sizes, which few kernels take: zeros change nothing.
        size = max(head_dim, value_dim)
        query, key, value = (nn.functional.pad(x, (0, size - x.shape[-1])) for x in (call.query, call.key, call.value))
        return self.attend(dataclasses.replace(call, query=query, key=key, value=value))[..., :value_dim]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                 dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
                 enable_gqa: bool = False) -> Tensor:
        """The same signature and meaning as ``torch.nn.functional.scaled_dot_product_attention``."""
        if dropout_p and "dropout" not in self.score_changes:
            raise ValueError(f"dropout_p: expected 0.0, because {type(self).__name__} has no dropout, got {dropout_p}")
        if key.shape[1] != query.shape[1] and not enable_gqa:
            raise ValueError(f"expected as many heads in query and key, got {query.shape[1]} and {key.shape[1]}: "
                             "pass enable_gqa=True for grouped-query attention")
        if is_causal and query.shape[-2] != key.shape[-2]:
            raise ValueError(f"expected as many keys as queries with is_causal, got {key.shape[-2]} and "
                             f"{query.shape[-2]} (torch aligns them to the top left): build an AttentionCall, which "
                             "aligns to the bottom right as caches do")
        return self.compute(from_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale))


def from_sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
              scale: float | None, **others: Any) -> AttentionCall:
    """The call that arguments of ``scaled_dot_product_attention`` mean; ``others``: more of its attributes."""
    return AttentionCall(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale, is_causal,
                         mask=attn_mask, score_changes={"dropout": dropout_p} if dropout_p else {},
                         **{"phase": "prefill" if is_causal else "bidirectional", **others})
