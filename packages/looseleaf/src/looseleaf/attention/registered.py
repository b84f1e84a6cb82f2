"""``register_attention``: a backend under a name that transformers knows, for everything that is built on it."""

from __future__ import annotations

import re
import sys
import weakref
from collections import deque
from typing import Any

from torch import nn

from looseleaf.attention.attached import Attached, Place, place_of
from looseleaf.attention.call import AttentionBackend
from looseleaf.attention.huggingface import register
from looseleaf.attention.watch import CROSS, argument_names, crosses, note_cross, watch

KEPT = 100_000
"""Calls of which a registered backend keeps the records."""


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


class Registered(Attached):
    """A backend that models use by name; see :func:`register_attention`.

    It has what :class:`looseleaf.Attached` has, for all models that use the name: the layers of one, in the order in
    which they were met, follow those of another. The oldest records are forgotten in time.
    """

    def __init__(self, name: str, backend: AttentionBackend) -> None:
        super().__init__(backend, [], set())
        self.name = name
        self._calls = deque(maxlen=KEPT)
        self._met: dict[int, tuple[Any, int]] = {}
        self._positions: list[tuple[int, int | None]] = []
        self.begin(lambda _, undo: register(name, self._meet, undo), self._undo)
        self._install = None  # a name that was taken back stays so

    def unregister(self) -> None:
        """Take the name back. Models that still have it need another ``set_attn_implementation``."""
        self.detach()

    def position(self, layer: int) -> tuple[int, int]:
        """See :class:`looseleaf.Attached`."""
        index, total = self._positions[layer]
        return index, total or len(self.layers)

    def _meet(self, module: nn.Module) -> Place:
        """The place of an attention module; one seen for the first time, inside its own call, gets the next."""
        if (place := place_of(module)) is not None:
            return place
        config: Any = getattr(module, "config", None)
        met, known = self._met.get(id(config), (None, 0))
        index = known if met is not None and met() is config else 0
        self._met[id(config)] = weakref.ref(config), index + 1
        layer, cross = len(self.layers), _crosses_now(module)
        self.layers.append(f"{getattr(config, 'model_type', 'model')}.{type(module).__name__}.{index}")
        self.chosen.add(layer)
        self._positions.append((index, getattr(config, "num_hidden_layers", None)))
        watch(module, note_cross, (self, layer), self._undo)
        vars(module)[CROSS] = cross
        return self, layer


def _crosses_now(module: nn.Module) -> bool:
    """Whether the call of ``module`` that runs has keys from another sequence, read off the frame of its forward.

    From the next call on the module is watched. Names that a forward assigns anew to its projections say nothing.
    """
    frame: Any = sys._getframe()
    while frame is not None and not (frame.f_locals.get("self") is module and "forward" in frame.f_code.co_name):
        frame = frame.f_back
    known = ("_states", "_values", "context", "memory")
    names = [n for n in argument_names(type(module)) if n.endswith(known)]
    return frame is not None and crosses(module, (), {n: frame.f_locals.get(n) for n in names})
