"""``capture`` and ``intervene``: reading and changing the outputs of modules by name pattern."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from looseleaf.errors import LooseleafError
from looseleaf.probes.spill import Store

MAX_BYTES = 4 * 2 ** 30
"""What :func:`capture` keeps at most unless told otherwise."""


class CaptureLimitError(LooseleafError, MemoryError):
    """A capture would hold more than was allowed."""


def matching_modules(model: nn.Module, patterns: str | Sequence[str]) -> dict[str, nn.Module]:
    """Modules whose names match, by name, in the model's order.

    Args:
        model: where to look.
        patterns: shell-style name patterns, such as ``"model.layers.*.mlp"``; ``*`` also matches dots, so a pattern
            that should end at a module must say how its name ends.

    Raises:
        ValueError: a pattern that matches nothing; near names are given.
    """
    names = {name: module for name, module in model.named_modules() if name}
    found: set[str] = set()
    if not patterns:
        raise ValueError(f"patterns={patterns!r}: allowed is a name pattern, or a list of one or more")
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = fnmatch.filter(names, pattern)
        # "model.layers.*.mlp" means the module, not what lies deeper: no star may swallow another level's name.
        depth = pattern.count(".")
        level = [n for n in hits if n.count(".") == depth]
        hits = level or hits
        if not hits:
            near = get_close_matches(pattern, names, 3, 0.3) or list(names)[:3]
            raise ValueError(f"no module of {type(model).__name__} matches {pattern!r}: near names are "
                             f"{', '.join(near)}")
        found.update(hits)
    return {name: module for name, module in names.items() if name in found}


@contextmanager
def capture(model: nn.Module, patterns: str | Sequence[str], reduce: Callable[[Tensor], Tensor] | None = None, *,
            max_bytes: int = MAX_BYTES, spill: bool | str | os.PathLike[str] = False,
            ) -> Iterator[dict[str, Sequence[Tensor]]]:
    """Keep the outputs of modules while the ``with`` block runs.

    Args:
        model: the model.
        patterns: name pattern or patterns of the modules, as in :func:`matching_modules`.
        reduce: applied to each output before it is kept, such as ``lambda x: x.mean(1)``.
        max_bytes: what may be kept in memory.
        spill: what happens beyond that. False: an error. True: it goes to safetensors files in a temporary folder,
            which is removed with the end of the block. A folder: the files go there and stay, so that everything can
            also be read after the block.

    Yields:
        Module name -> one tensor for each call of the module, detached. Of a module that returns several things the
        first tensor is kept. A tensor on disk is read each time it is asked for.

    Raises:
        ValueError: an unknown pattern; a folder that does not exist or holds files of an earlier capture.
        CaptureLimitError: more than ``max_bytes`` would be kept and ``spill`` is False; raised from the model's
            forward.
    """
    if max_bytes <= 0:
        raise ValueError(f"max_bytes={max_bytes}: allowed is a number of bytes above 0")
    modules = matching_modules(model, patterns)
    store = Store(list(modules), max_bytes, None if isinstance(spill, bool) else spill)
    held = 0

    def keep(name: str, output: Any) -> None:
        nonlocal held
        value = first_tensor(output, name).detach()
        # A view would keep the whole tensor alive, and be overwritten by in-place operations.
        value = value if reduce is None else reduce(value)
        if not isinstance(value, Tensor):
            raise TypeError(f"reduce returned {type(value).__name__} for {name}: allowed is a tensor")
        value = value.clone()
        held += value.numel() * value.element_size()
        if held > max_bytes and spill is False:
            raise CaptureLimitError(
                f"capture would hold {held} bytes: allowed is max_bytes={max_bytes}. Name fewer modules, pass "
                "reduce=... to keep less of each output, take what you need after every batch, or pass spill=True")
        store.add(name, value)

    handles: list[Any] = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(
                lambda module, args, output, name=name: keep(name, output)))
        yield dict(store.kept)
    finally:
        for handle in handles:
            handle.remove()
        store.close()


@contextmanager
def intervene(model: nn.Module, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Change the outputs of modules while the ``with`` block runs.

    Args:
        model: the model.
        changes: name pattern -> function from a module's output to what takes its place, of the same shape. Gradients
            flow through it. Where several patterns match a module they act in the order given.

    Raises:
        ValueError: an unknown pattern; or, from the model's forward, a function that changed the shape.
    """
    plans = [(matching_modules(model, pattern), function) for pattern, function in changes.items()]

    def change(name: str, function: Callable[[Tensor], Tensor], output: Any) -> Any:
        value = first_tensor(output, name)
        new = function(value)
        if not isinstance(new, Tensor) or new.shape != value.shape:
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(f"the intervention on {name} returned {got}: allowed is a tensor of shape "
                             f"{tuple(value.shape)}, that of the module's output")
        return with_first_tensor(output, new.to(value.dtype))

    handles: list[Any] = []
    try:
        for modules, function in plans:
            for name, module in modules.items():
                handles.append(module.register_forward_hook(
                    lambda module, args, output, name=name, function=function: change(name, function, output)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Any, name: str = "the module") -> Tensor:
    """The first tensor of what a module returned: a tensor, a tuple or list, or a mapping.

    Raises:
        TypeError: there is none.
    """
    if isinstance(output, Tensor):
        return output
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for item in items:
        if isinstance(item, Tensor):
            return item
    raise TypeError(f"{name} returned {type(output).__name__} without a tensor in it: choose another module")


def with_first_tensor(output: Any, new: Tensor) -> Any:
    """What a module returned, with its first tensor exchanged; the rest and the type stay."""
    if isinstance(output, Tensor):
        return new
    if isinstance(output, Mapping):
        key = next(k for k, v in output.items() if isinstance(v, Tensor))
        output[key] = new  # type: ignore[index]  # a ModelOutput of transformers, or a dict
        return output
    at = next(i for i, item in enumerate(output) if isinstance(item, Tensor))
    parts = [*output[:at], new, *output[at + 1:]]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)


__all__ = ["CaptureLimitError", "capture", "first_tensor", "intervene", "matching_modules"]
