"""Attaching to diffusers pipelines and models, through their attention processors.

Each processor of a model family does its own projections, norms and rotary embeddings, and in the end calls
``scaled_dot_product_attention``. The processor installed here runs the former one and takes over that one call.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from looseleaf.attention.attach import Attached
from looseleaf.attention.call import AttentionCall
from looseleaf.errors import UnsupportedModelError


def attention_layers(model: Any) -> list[str] | None:
    """Names of the modules with attention processors; None if this is nothing of diffusers."""
    if "diffusers" not in sys.modules:
        return None
    denoiser = _denoiser(model)
    return None if denoiser is None else [name for name, _ in _modules(denoiser)]


def install(model: Any, attached: Attached) -> None:
    """Put a processor around every processor, and count denoising steps.

    Raises:
        UnsupportedModelError: the model has a backend attached.
    """
    denoiser = _denoiser(model)
    assert denoiser is not None
    steps = _Steps(attached, getattr(model, "scheduler", None))
    for layer, (name, module) in enumerate(_modules(denoiser)):
        former = module.processor
        if isinstance(former, _Processor):
            raise UnsupportedModelError(f"{type(model).__name__} has a backend attached already (layer {name}): "
                                        "detach that one first")
        module.processor = _Processor(former, attached, layer)
        attached._undo.append(partial(setattr, module, "processor", former))
    hook = denoiser.register_forward_pre_hook(steps.see, with_kwargs=True)
    attached._undo.append(hook.remove)


def _denoiser(model: Any) -> nn.Module | None:
    """The model with attention processors: ``model`` itself, or a pipeline's transformer or U-Net."""
    for candidate in (model, getattr(model, "transformer", None), getattr(model, "unet", None)):
        if isinstance(candidate, nn.Module) and type(candidate).__module__.startswith("diffusers") \
                and any(True for _ in _modules(candidate)):
            return candidate
    return None


def _modules(denoiser: nn.Module) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in denoiser.named_modules()
            if hasattr(m, "processor") and callable(m.processor) and not isinstance(m.processor, nn.Module)]


class _Steps:
    """Counts denoising steps: a step begins when the denoiser is called with another timestep."""

    def __init__(self, attached: Attached, scheduler: Any) -> None:
        self.attached, self.scheduler, self.told = attached, scheduler, attached.steps
        self._last: float | None = None
        self._said: int | None = None

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward hook that runs before the denoiser."""
        given = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        if given is None:
            return
        if self.attached.step is not None and self.attached.step != self._said:
            return  # the caller's loop counts by itself
        now = float(torch.as_tensor(given, dtype=torch.float64).flatten()[0])
        if self._said is None or self.attached.step is None or self._last is None or now > self._last:
            self._said = 0  # timesteps fall while a picture is made: a rise begins a new one
            if self.told is None:
                self.attached.steps = getattr(self.scheduler, "num_inference_steps", None)
        elif now < self._last:
            self._said += 1
        self._last, self.attached.step = now, self._said


class _Processor:
    """The former processor, with its one call of attention taken over."""

    def __init__(self, former: Callable[..., Any], attached: Attached, layer: int) -> None:
        self.former, self.attached, self.layer = former, attached, layer
        # diffusers reads the signature of `processor.__call__` to see which arguments it may give: what is not named
        # there, such as rotary embeddings, never arrives. The call itself goes to the method of the class.
        shown: Any = functools.partial(_Processor.__call__, self)
        shown.__signature__ = _signature(former)
        self.__call__ = shown  # type: ignore[method-assign]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "former":
            raise AttributeError(name)
        return getattr(self.former, name)

    @torch.compiler.disable
    def __call__(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """As the former processor."""
        if self.layer not in self.attached.chosen:
            return self.former(attn, *args, **kwargs)
        with _TakeOver(self, attn):
            return self.former(attn, *args, **kwargs)


def _signature(former: Any) -> Any:
    import inspect

    return inspect.signature(former if inspect.isfunction(former) else former.__call__)


class _TakeOver(TorchFunctionMode):
    """While it is on, ``F.scaled_dot_product_attention`` goes to the backend."""

    def __init__(self, processor: _Processor, module: nn.Module) -> None:
        super().__init__()
        self.processor, self.module = processor, module

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        call = self._call(*args, **(kwargs or {}))
        if call is None:
            return func(*args, **(kwargs or {}))
        return self.processor.attached.compute(call, self.processor.layer)

    def _call(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
              dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
              enable_gqa: bool = False) -> AttentionCall | None:
        if dropout_p or query.dim() != 4:
            return None
        return AttentionCall(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale, is_causal,
                             mask=attn_mask, phase="bidirectional", module=self.module)
