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
PLACE = "_looseleaf"
"""The attribute of a watched module that says which attachment it belongs to, and which layer it is."""
CROSS = "_looseleaf_cross"
"""The attribute that says whether the call that runs is cross attention."""
LEARNED = "_looseleaf_learned"
"""The name under which a backend's learned module is part of a watched module."""
OTHER_SEQUENCE = frozenset((
    "key_value_states", "encoder_hidden_states", "cross_attention_states", "key", "keys", "k", "key_tensor", "kv",
    "context", "context_hidden_states", "memory"))
"""Arguments of attention modules that hold the sequence of the keys."""


def watch(module: nn.Module, around: Around, place: Any, undo: ExitStack) -> None:
    """Let ``around(module, function, args, kwargs)`` make each call of ``module``, until ``undo`` is closed.

    Args:
        module: the module. One that is watched already is watched for ``place`` alone meanwhile.
        around: module-level function; calls ``function(*args, **kwargs)`` for the module's own result.
        place: kept at the module as :data:`PLACE`.
        undo: where the way back is put.

    Raises:
        UnsupportedModelError: the module is compiled TorchScript.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedModelError("expected a module of Python code, got TorchScript: attach to the model before "
                                    "torch.jit.script or trace")
    former, attributes = type(module), {k: v for k, v in vars(module).items() if k == PLACE}
    alive = weakref.ref(module)

    def restore() -> None:
        if (watched := alive()) is not None:
            watched.__class__ = former
            for name in (PLACE, CROSS):
                vars(watched).pop(name, None)
            vars(watched).update(attributes)

    undo.callback(restore)
    vars(module)[PLACE] = place
    module.__class__ = _watched(plain_class(module), around)


def plain_class(module: nn.Module) -> Any:
    """The class that a module has when it is not watched."""
    return getattr(type(module), "_looseleaf_plain", type(module))


def note_cross(module: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Keep at an attention module whether the call that runs is cross attention."""
    vars(module)[CROSS] = crosses(module, args, kwargs)
    return function(*args, **kwargs)


def crosses(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of an attention module has keys from another sequence than its queries."""
    names = getattr(type(module), "_looseleaf_names", ())
    given = {**dict(zip(names, args)), **kwargs}
    queries = args[0] if args else given.get(names[0]) if names else None
    others = (given.get(name) for name in OTHER_SEQUENCE)
    return any(isinstance(other, Tensor) and other is not queries for other in others)


def argument_names(plain: Any) -> tuple[str, ...]:
    """Names of the arguments of a module class's ``forward``."""
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
