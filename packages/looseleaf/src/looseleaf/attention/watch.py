"""Seeing how a module is called, without a trace in copies of it.

A hook or a replaced ``forward`` stays in a deep copy, is not seen by a model that was compiled before, and runs on the
wrong replica under DataParallel. The class of a module has none of these faults: while a module is watched, it is of a
subclass whose calls go through a function first.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf.errors import UnsupportedModelError

Around = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
# Attributes of a watched module: which attachment it belongs to and which layer it is, whether the call that runs is
# cross attention, and the learned module of the backend.
PLACE, CROSS, LEARNED = "_looseleaf", "_looseleaf_cross", "_looseleaf_learned"
OTHER_SEQUENCE = ("key_value_states", "encoder_hidden_states", "cross_attention_states", "key", "keys", "k",
                  "key_tensor", "kv", "context", "context_hidden_states", "memory")
"""Arguments of attention modules that hold the sequence of the keys."""


def watch(module: nn.Module, around: Around, place: Any, undo: ExitStack) -> None:
    """Let the module-level function ``around`` make each call of ``module``, until ``undo`` is closed.

    It calls ``function(*args, **kwargs)`` for the module's own result, and finds ``place`` as :data:`PLACE`. A module
    that is watched already is watched for ``place`` alone meanwhile.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedModelError("expected a module of Python code, got TorchScript: attach to the model before "
                                    "torch.jit.script or trace")
    former = {name: vars(module)[name] for name in (PLACE, CROSS) if name in vars(module)}
    undo.callback(_restore, weakref.ref(module), type(module), former)
    vars(module)[PLACE] = place
    module.__class__ = _watched(plain_class(module), around)


def _restore(reference: Any, former: type, attributes: dict[str, Any]) -> None:
    if (module := reference()) is not None:
        module.__class__ = former
        for name in (PLACE, CROSS):
            vars(module).pop(name, None)
        vars(module).update(attributes)


def plain_class(module: nn.Module) -> Any:
    """The class that a module has when it is not watched."""
    return getattr(type(module), "_looseleaf_plain", type(module))


def note_cross(module: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Keep at an attention module whether the call that runs is cross attention."""
    vars(module)[CROSS] = crosses(module, args, kwargs)
    return function(*args, **kwargs)


def crosses(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of an attention module has keys from another sequence, maybe in its cache (Mllama's)."""
    names = getattr(type(module), "_looseleaf_names", ())
    given = {**dict(zip(names, args)), **kwargs}
    queries = args[0] if args else given.get(names[0]) if names else None
    if given.get("past_key_values") is not None and "CrossAttention" in plain_class(module).__name__:
        return True
    return any(isinstance(given.get(n), Tensor) and given[n] is not queries for n in OTHER_SEQUENCE)


def argument_names(plain: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(plain.forward).parameters)[1:]


@functools.cache
def _watched(plain: Any, around: Around) -> Any:
    """The subclass of ``plain`` for one way of watching."""

    class Watched(plain):
        _looseleaf_plain = plain
        _looseleaf_names = argument_names(plain)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            # Where accelerate has put a forward of its own on the instance, that of the class is never called.
            if "forward" in self.__dict__:
                return around(self, super().__call__, args, kwargs)
            return super().__call__(*args, **kwargs)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if "forward" in self.__dict__:
                return super().forward(*args, **kwargs)
            return around(self, super().forward, args, kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:
            """A copy, or what is written to a file, is a plain module."""
            state = {name: value for name, value in self.__dict__.items() if not name.startswith(PLACE)}
            state["_modules"] = {name: m for name, m in state["_modules"].items() if name != LEARNED}
            return copyreg._reconstructor, (plain, object, None), state  # type: ignore[attr-defined]

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Watched, name, getattr(plain, name))
    return Watched
