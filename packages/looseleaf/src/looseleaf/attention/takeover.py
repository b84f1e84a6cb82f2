"""Attaching to any module that calls ``scaled_dot_product_attention``, diffusers pipelines and models among them.

While a watched module runs, its calls of that one function go to the backend. Projections, norms and rotary embeddings
stay the module's own.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from looseleaf.attention.attached import Attached, moved_context
from looseleaf.attention.call import Phase, from_sdpa
from looseleaf.attention.watch import PLACE, crosses, watch
from looseleaf.unwrap import unwrapped

_thread = threading.local()
_FAST = (nn.TransformerEncoderLayer, nn.TransformerEncoder)
"""Modules that in evaluation mode compute the attention of their parts by themselves, unless somebody looks on."""


def install(model: nn.Module, modules: Mapping[str, nn.Module], attached: Attached, undo: ExitStack) -> None:
    """Watch the attention modules, and what would pass them by."""
    for layer, module in enumerate(modules.values()):
        if layer in attached.chosen:
            watch(module, _take_over, (attached, layer), undo)
            if getattr(module, "fused_attn", None) is False:  # timm: whether the function is called at all
                module.fused_attn = True  # type: ignore[assignment]
                undo.callback(setattr, module, "fused_attn", False)
    for name, module in model.named_modules():
        inside = name + "." if name else ""
        if isinstance(module, _FAST) and PLACE not in vars(module) and any(n.startswith(inside) for n in modules):
            watch(module, _take_over, (attached, None), undo)


@torch.compiler.disable
def _take_over(module: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One call of a watched module."""
    with _Mode(module, args, kwargs) as mode:
        out = function(*args, **kwargs)
    if mode.layer is not None and not mode.calls and mode.attached.was_there():
        mode.attached.exactly(mode.layer, "unknown", "no call of scaled_dot_product_attention", torch.device("cpu"),
                              lambda: None)
    return out


class _Mode(TorchFunctionMode):
    """While it is on, ``F.scaled_dot_product_attention`` goes to the backend."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.is_cross, self.calls = module, crosses(module, args, kwargs), 0
        self.attached, self.layer = vars(module)[PLACE]
        hidden = args[0] if args else kwargs.get("hidden_states")
        self.tokens = hidden.shape[1] if isinstance(hidden, Tensor) and hidden.dim() == 3 else 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.layer is not None and not getattr(_thread, "computing", False) and self.attached.was_there():
            if func is F.scaled_dot_product_attention:
                func = self._attention
            elif func is F.multi_head_attention_forward:
                func = self._multi_head
        return func(*args, **(kwargs or {}))

    def _multi_head(self, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What ``nn.MultiheadAttention`` calls; torch looks for no mode inside it."""
        function: Any = F.multi_head_attention_forward
        if kwargs.get("need_weights", True):
            self.calls += 1
            return self.attached.exactly(self.layer, "bidirectional", "need_weights=True asks for exact weights",
                                         query.device, lambda: function(query, key, *args, **kwargs))
        self.is_cross = key is not query
        names = {**function.__globals__, "scaled_dot_product_attention": self._attention,
                 "has_torch_function": lambda *a: False}
        inner = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
        inner.__kwdefaults__ = function.__kwdefaults__
        return inner(query, key, *args, **kwargs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                   dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
                   enable_gqa: bool = False) -> Any:
        self.calls += 1
        batch, lq, lk = query.shape[0], query.shape[-2], key.shape[-2]
        if lq == lk > self.tokens > 0:  # joint attention: the other sequence is among the queries, too
            self.is_cross = False
        phase: Phase = "prefill" if is_causal else "decode" if lq == 1 < lk and not self.is_cross else "bidirectional"
        reason, own = None, functools.partial(F.scaled_dot_product_attention, query, key, value, attn_mask, dropout_p,
                                              is_causal, scale=scale, enable_gqa=enable_gqa)
        if dropout_p and "dropout" not in self.attached.backend.score_changes:
            reason = "dropout in training"
        elif query.dim() != 4 or key.dim() != 4 or query.is_nested:
            reason = f"a query of {query.dim()} dimensions, or nested"
        elif is_causal and lq != lk:
            reason = "is_causal with another number of keys, which torch aligns to the first key"
        _thread.computing = True  # the backend's own use of the function is not for the backend
        try:
            if reason is not None:
                return self.attached.exactly(self.layer, phase, reason, query.device, own)
            key, value = (x.expand(batch, -1, -1, -1) for x in (key, value))
            return self.attached.compute(from_sdpa(
                query, key, value, attn_mask, dropout_p, is_causal, scale, phase=phase, module=self.module,
                is_cross=self.is_cross or (lq != lk and phase == "bidirectional"),
                context=moved_context(self.attached.context, batch, lq, lk)), self.layer)
        finally:
            _thread.computing = False


# ---------------------------------------------------------------------- diffusers
def denoiser(model: Any) -> nn.Module | None:
    """The diffusers model with attention processors: ``model`` itself, or a pipeline's transformer or U-Net."""
    if "diffusers" not in sys.modules:
        return None
    for candidate in (model, getattr(model, "transformer", None), getattr(model, "unet", None)):
        inner = unwrapped(candidate)
        if isinstance(inner, nn.Module) and type(inner).__module__.startswith("diffusers") and processed(inner):
            return inner
    return None


def processed(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with attention processors, by name."""
    return {name: m for name, m in model.named_modules()
            if hasattr(m, "processor") and callable(m.processor) and not isinstance(m.processor, nn.Module)}


def install_diffusers(model: nn.Module, scheduler: Any, modules: Mapping[str, nn.Module], attached: Attached,
                      undo: ExitStack) -> None:
    """As :func:`install`, and count denoising steps."""
    install(model, modules, attached, undo)
    watch(model, _counting, (attached, _Steps(attached, scheduler)), undo)


def _counting(module: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    vars(module)[PLACE][1].see(kwargs.get("timestep", args[1] if len(args) > 1 else None))
    return function(*args, **kwargs)


class _Steps:
    """Counts denoising steps: a step begins when the denoiser is called with another timestep."""

    def __init__(self, attached: Attached, scheduler: Any) -> None:
        self.attached, self.scheduler, self.fixed = attached, scheduler, attached.steps
        self._last: float | None = None
        self._counted: int | None = None

    @torch.compiler.disable
    def see(self, timestep: Any) -> None:
        """Called with the timestep before the denoiser is."""
        if timestep is None or self.attached.step not in (None, self._counted):
            return  # the caller's loop counts by itself
        now = float(torch.as_tensor(timestep, dtype=torch.float64).flatten()[0])
        if self._counted is None or self._last is None or self.attached.step is None or now > self._last:
            self._counted = 0  # timesteps fall while a picture is made: a rise begins a new one
            if self.fixed is None:
                self.attached.steps = getattr(self.scheduler, "num_inference_steps", None)
        elif now < self._last:
            self._counted += 1
        self._last, self.attached.step = now, self._counted
