"""``register_attention``: a backend under a name that transformers knows, for everything that is built on it."""

from __future__ import annotations

import itertools
import re
import sys
import weakref
from collections import deque
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from looseleaf.attention.attached import Attached, Place, make_report, place_of
from looseleaf.attention.call import AttentionBackend
from looseleaf.attention.huggingface import register
from looseleaf.attention.watch import CROSS, argument_names, crosses, note_cross, watch
from looseleaf.report import Report

KEPT = 100_000
"""Calls of each model of which a registered backend keeps the records."""


def register_attention(name: str, backend: AttentionBackend) -> Registered:
    """Let transformers models use ``backend`` by name, as ``attn_implementation=name``.

    ``from_pretrained``, ``pipeline``, ``model.set_attn_implementation`` and whatever is built on them take the name,
    such as lm-eval's ``model_args``. Padding, masks and fallbacks are as with :func:`looseleaf.attach`.

    Args:
        name: letters, digits, ``-`` and ``_``; not a name that transformers uses, nor with "flash" in it.
        backend: what computes the attention. One with learned modules, or with a ``prepare`` of its own, needs
            :func:`looseleaf.attach`, which knows the model.

    Raises:
        ValueError: such a name or backend cannot be registered.
    """
    from transformers import AttentionInterface

    if not isinstance(backend, AttentionBackend):
        raise TypeError(f"backend: expected an instance of an AttentionBackend, got {backend!r}")
    if not re.fullmatch(r"[\w-]+", name) or "flash" in name or name in ("eager", *AttentionInterface()):
        raise ValueError(f"name: expected a new name of letters, digits, - and _ without 'flash', got {name!r}")
    if backend.modules or type(backend).prepare is not AttentionBackend.prepare:
        raise ValueError(f"backend: expected one that needs no model to prepare for, got {type(backend).__name__}: use "
                         "looseleaf.attach(model, backend)")
    return Registered(name, backend)


class Registered:
    """A backend that models use by name; see :func:`register_attention`.

    Attributes:
        name: what to give as ``attn_implementation``.
        backend: the attention backend.
        context: as :attr:`looseleaf.Attached.context`, for all models that use the name.
    """

    def __init__(self, name: str, backend: AttentionBackend) -> None:
        self.name, self.backend = name, backend
        self.context: dict[str, Tensor] = {}
        self._models: list[tuple[Any, Attached]] = []
        self._undo = ExitStack()
        register(name, self.meet, self._undo)

    @property
    def records(self) -> list[dict[str, Any]]:
        """One dictionary for each call, as :attr:`looseleaf.Attached.records`; the oldest are forgotten in time.

        The layers of one model, or of one part of a model with a configuration of its own, follow those of another.
        """
        counts = [len(attached.layers) for _, attached in self._models]
        return [{**record, "layer": first + record["layer"]}
                for first, (_, attached) in zip(itertools.accumulate(counts, initial=0), self._models)
                for record in attached.records]

    def report(self) -> Report:
        """Calls, time, density, patterns and fallbacks of each layer."""
        layers = [name for _, attached in self._models for name in attached.layers]
        return make_report(self.backend, layers, len(layers), self.records)

    def reset(self) -> None:
        """Forget all records and the backend's state."""
        for _, attached in self._models:
            attached.reset()

    def unregister(self) -> None:
        """Take the name back. Models that still have it need another ``set_attn_implementation``."""
        self._undo.close()
        self._models.clear()

    def meet(self, module: nn.Module) -> Place:
        """The place of an attention module; one seen for the first time, inside its own call, gets the next."""
        if (place := place_of(module)) is not None:
            return place
        config: Any = getattr(module, "config", None)
        attached = next((a for of, a in self._models if of() is config), None)
        if attached is None:
            attached = Attached(self.backend, [], set(), context=self.context, _calls=deque(maxlen=KEPT),
                                _total=getattr(config, "num_hidden_layers", None))
            self._models.append((weakref.ref(config), attached))
        layer, cross = len(attached.layers), _crosses_now(module)
        attached.layers.append(f"{getattr(config, 'model_type', 'model')}.{type(module).__name__}.{layer}")
        attached.chosen.add(layer)
        watch(module, note_cross, (attached, layer), self._undo)
        vars(module)[CROSS] = cross
        return attached, layer


def _crosses_now(module: nn.Module) -> bool:
    """Whether the call of ``module`` that runs has keys from another sequence, read off the frame of its forward.

    From the next call on the module is watched. Names that a forward assigns anew to its projections say nothing.
    """
    frame: Any = sys._getframe()
    while frame is not None and not (frame.f_locals.get("self") is module and "forward" in frame.f_code.co_name):
        frame = frame.f_back
    names = [n for n in argument_names(type(module)) if n.endswith("_states") or n in ("context", "memory")]
    return frame is not None and crosses(module, (), {n: frame.f_locals.get(n) for n in names})
