"""``capture`` and ``intervene``: reading and changing the outputs of modules by name pattern."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from looseleaf.errors import LooseleafError
from looseleaf.names import match
from looseleaf.unwrap import unwrapped

MAX_BYTES = 4 * 2 ** 30
"""What :func:`capture` keeps at most by default."""


class CaptureLimitError(LooseleafError, MemoryError):
    """A capture would hold more than ``max_bytes``."""


def matching_modules(model: nn.Module, patterns: str | Sequence[str]) -> dict[str, nn.Module]:
    """Modules whose names match, by name, in the model's order.

    Args:
        model: where to look; names are those inside wrappers such as ``torch.compile`` and PEFT.
        patterns: one or several, see :mod:`looseleaf.names`; ``"layers.*.mlp"`` is the MLP of every layer.

    Raises:
        ValueError: a pattern that matches nothing; near names are given.
    """
    modules = {name: module for name, module in unwrapped(model).named_modules() if name}
    return {name: modules[name] for name in match(modules, patterns)}


@contextmanager
def capture(model: nn.Module, patterns: str | Sequence[str], reduce: Callable[[Tensor], Tensor] | None = None, *,
            max_bytes: int = MAX_BYTES, spill: bool | str | os.PathLike[str] = False,
            ) -> Iterator[dict[str, Sequence[Tensor]]]:
    """Keep the outputs of modules while the ``with`` block runs.

    Args:
        model: the model. Where it, or a part of it, was compiled, the block runs it uncompiled, as compiled code calls
            no hooks.
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
        raise ValueError(f"max_bytes: expected a number of bytes > 0, got {max_bytes!r}")
    modules = matching_modules(model, patterns)
    store = _Store(list(modules), max_bytes, None if isinstance(spill, bool) else spill)
    total = 0

    def keep(name: str, output: Any) -> None:
        nonlocal total
        value = first_tensor(output, name).detach()
        value = value if reduce is None else reduce(value)
        if not isinstance(value, Tensor):
            raise TypeError(f"reduce: expected a function that returns a tensor, got {type(value).__name__} for {name}")
        value = value.clone()  # a view would keep the whole tensor alive, and be overwritten by in-place operations
        total += value.numel() * value.element_size()
        if total > max_bytes and spill is False:
            raise CaptureLimitError(
                f"expected at most max_bytes={max_bytes} of captured outputs, got {total}. Name fewer modules, pass "
                "reduce=... to keep less of each output, take what you need after every batch, or pass spill=True")
        store.add(name, value)

    try:
        with _hooked(model, [(name, module, keep) for name, module in modules.items()]):
            yield dict(store.outputs)
    finally:
        store.close()


@contextmanager
def intervene(model: nn.Module, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Change the outputs of modules while the ``with`` block runs.

    Args:
        model: the model; run uncompiled in the block, as by :func:`capture`.
        changes: name pattern -> function from a module's output to what takes its place, of the same shape. Gradients
            flow through it. Where several patterns match a module they act in the order given.

    Raises:
        ValueError: an unknown pattern; or, from the model's forward, a function that changed the shape.
    """
    def changing(function: Callable[[Tensor], Tensor]) -> Callable[[str, Any], Any]:
        def change(name: str, output: Any) -> Any:
            value = first_tensor(output, name)
            new = function(value)
            if not isinstance(new, Tensor) or new.shape != value.shape:
                got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise ValueError(f"the intervention on {name}: expected a tensor of shape {tuple(value.shape)}, that "
                                 f"of the module's output, got {got}")
            return _with_first_tensor(output, new.to(value.dtype))

        return change

    with _hooked(model, [(name, module, changing(function)) for pattern, function in changes.items()
                         for name, module in matching_modules(model, pattern).items()]):
        yield


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
    raise TypeError(f"{name}: expected an output with a tensor in it, got {type(output).__name__}: choose another "
                    "module")


def _with_first_tensor(output: Any, new: Tensor) -> Any:
    """What a module returned, with its first tensor exchanged; the rest and the type stay."""
    if isinstance(output, Tensor):
        return new
    if isinstance(output, Mapping):
        key = next(k for k, v in output.items() if isinstance(v, Tensor))
        output[key] = new  # type: ignore[index]  # a ModelOutput of transformers, or a dict
        return output
    at = next(i for i, item in enumerate(output) if isinstance(item, Tensor))
    items = [*output[:at], new, *output[at + 1:]]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


@contextmanager
def _hooked(model: nn.Module, hooks: Sequence[tuple[str, nn.Module, Callable[[str, Any], Any]]]) -> Iterator[None]:
    """Call ``hook(name, output)`` after each module; code that was compiled before would not."""
    called = False

    def forward_hook(name: str, hook: Callable[[str, Any], Any]) -> Callable[..., Any]:
        def function(module: nn.Module, args: Any, output: Any) -> Any:
            nonlocal called
            called = True
            return hook(name, output)

        return function

    with uncompiled(model), ExitStack() as stack:
        for name, module, hook in hooks:
            stack.callback(module.register_forward_hook(forward_hook(name, hook)).remove)
        yield
        dynamo = sys.modules.get("torch._dynamo.utils")
        if hooks and not called and dynamo is not None and dynamo.counters["frames"]:
            warnings.warn(f"{hooks[0][0]} was never called in the block. If the model ran there, then inside compiled "
                          "code, which calls no hooks: give capture, intervene or patch what torch.compile returned, "
                          "or set torch.compiler.set_stance('force_eager')", stacklevel=4)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run ``model`` uncompiled while the ``with`` block runs, for hooks of one's own: compiled code calls none."""
    if any(_compiled(module) for module in model.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _compiled(module: nn.Module) -> bool:
    """By ``torch.compile(module)``, ``module.compile()``, or ``module.forward = torch.compile(module.forward)``."""
    return (hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
            or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"))


# ------------------------------------------------------------------------------------- outputs in memory and on disk
_OnDisk = tuple[Path, str, torch.device]  # file, key in it, and the device the tensor was on


class _Outputs(Sequence[Tensor]):
    """The outputs of one module, a tensor for each call; those on disk are read when they are asked for."""

    def __init__(self) -> None:
        self.items: list[Tensor | _OnDisk] = []

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [_read(item) for item in self.items[index]]
        return _read(self.items[index])

    def __iter__(self) -> Iterator[Tensor]:
        return map(_read, self.items)


class _Store:
    """Tensors by module name and call; held in memory until they are more than ``max_bytes``, then written.

    Args:
        names: of the modules.
        max_bytes: what memory may hold.
        folder: where files go; it must exist, and hold none of an earlier capture. None: a temporary folder, made with
            the first file and removed by :meth:`close`.
    """

    def __init__(self, names: Sequence[str], max_bytes: int, folder: str | os.PathLike[str] | None) -> None:
        self.outputs: dict[str, _Outputs] = {name: _Outputs() for name in names}
        self._max_bytes, self._in_memory, self._files = max_bytes, 0, 0
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None:
            if not self._folder.is_dir():
                raise ValueError(f"spill: expected True, False or a folder that exists, got {str(folder)!r}")
            if next(self._folder.glob("capture-*.safetensors"), None) is not None:
                raise ValueError(f"spill: expected an empty folder, got {str(folder)!r}, which holds an earlier "
                                 "capture (capture-*.safetensors): name another, or remove those files")

    def add(self, name: str, value: Tensor) -> None:
        """Keep one more output; what memory holds is written first where this one would be too much."""
        size = value.numel() * value.element_size()
        if self._in_memory and self._in_memory + size > self._max_bytes:
            self._write()
        self.outputs[name].items.append(value)
        self._in_memory += size
        if self._in_memory > self._max_bytes:
            self._write()

    def close(self) -> None:
        """Remove the files if their folder is a temporary one."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def _write(self) -> None:
        from safetensors.torch import save_file

        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="looseleaf-capture-")
            self._folder = Path(self._temporary.name)
        path = self._folder / f"capture-{self._files:06d}.safetensors"
        in_memory: list[tuple[list[Any], int, str, Tensor]] = [
            (outputs.items, call, f"{name}/{call}", item) for name, outputs in self.outputs.items()
            for call, item in enumerate(outputs.items) if isinstance(item, Tensor)]
        try:
            save_file({key: item.contiguous() for _, _, key, item in in_memory}, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        for items, call, key, item in in_memory:
            items[call] = (path, key, item.device)
        self._files += 1
        self._in_memory = 0


def _read(item: Tensor | _OnDisk) -> Tensor:
    if isinstance(item, Tensor):
        return item
    from safetensors import safe_open

    path, key, device = item
    if not path.exists():
        raise FileNotFoundError(f"{path} with {key} is gone: a capture that spills to a temporary folder can be read "
                                "inside its with-block; pass spill='folder' to keep the files")
    with safe_open(path, "pt") as file:
        value: Tensor = file.get_tensor(key)
    return value.to(device)


__all__ = ["CaptureLimitError", "capture", "first_tensor", "intervene", "matching_modules", "uncompiled"]
