"""``capture``, ``intervene`` and ``patch``: reading and changing the outputs of modules by name pattern."""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from looseleaf.errors import LooseleafError
from looseleaf.files import save_tensors
from looseleaf.names import match
from looseleaf.unwrap import named_modules

Positions = int | Sequence[int] | Tensor
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
    modules = named_modules(model)
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
    outputs = {name: _Outputs() for name in modules}
    held, numbers = 0, itertools.count()

    def keep(name: str, output: Any) -> None:
        nonlocal held
        value = first_tensor(output, name).detach()
        value = value if reduce is None else reduce(value)
        if not isinstance(value, Tensor):
            raise TypeError(f"reduce: expected a function that returns a tensor, got {type(value).__name__} for {name}")
        held += value.nbytes
        if held > max_bytes and folder is None:
            raise CaptureLimitError(
                f"expected at most max_bytes={max_bytes} of captured outputs, got {held}. Name fewer modules, pass "
                "reduce=... to keep less of each output, take what you need after every batch, or pass spill=True")
        # a view would keep the whole tensor alive, and be overwritten by in-place operations
        outputs[name].items.append(value.clone())
        if held > max_bytes and folder is not None:
            _write(outputs, folder / f"capture-{next(numbers):06d}.safetensors")
            held = 0

    with ExitStack() as stack:
        folder = None if spill is False else Path(
            stack.enter_context(TemporaryDirectory(prefix="looseleaf-capture-")) if spill is True else spill)
        if folder is not None and not folder.is_dir():
            raise ValueError(f"spill: expected True, False or a folder that exists, got {str(folder)!r}")
        if folder is not None and any(folder.glob("capture-*.safetensors")):
            raise ValueError(f"spill: expected an empty folder, got {str(folder)!r}, which holds an earlier capture "
                             "(capture-*.safetensors): name another, or remove those files")
        stack.enter_context(_hooked(model, [(name, module, keep) for name, module in modules.items()]))
        yield dict(outputs)


class _Outputs(Sequence[Tensor]):
    """The outputs of one module, a tensor for each call; those on disk are read when they are asked for."""

    def __init__(self) -> None:
        self.items: list[Any] = []  # a tensor, or the file that it is in, its name there and its device

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        item = self.items[index]
        if isinstance(item, Tensor):
            return item
        path, key, device = item
        if not path.exists():
            raise FileNotFoundError(f"{path} with {key} is gone: a capture that spills to a temporary folder can be "
                                    "read inside its with-block; pass spill='folder' to keep the files")
        with safe_open(path, "pt") as file:
            return file.get_tensor(key).to(device)


def _write(outputs: Mapping[str, _Outputs], path: Path) -> None:
    """Write what is in memory to one file."""
    places = [(own.items, call, f"{name}/{call}") for name, own in outputs.items()
              for call, item in enumerate(own.items) if isinstance(item, Tensor)]
    save_tensors(path, {key: items[call] for items, call, key in places}, format="looseleaf.capture/1")
    for items, call, key in places:
        items[call] = (path, key, items[call].device)


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
    with _hooked(model, [(name, module, partial(_changed, function)) for pattern, function in changes.items()
                         for name, module in matching_modules(model, pattern).items()]):
        yield


def _changed(function: Callable[[Tensor], Tensor], name: str, output: Any) -> Any:
    """What a module returned, with ``function`` of its first tensor in the place of that; the type stays."""
    value = first_tensor(output, name)
    new = function(value)
    if not isinstance(new, Tensor) or new.shape != value.shape:
        got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise ValueError(f"the intervention on {name}: expected a tensor of shape {tuple(value.shape)}, that of the "
                         f"module's output, got {got}")
    new = new.to(value.dtype)
    if isinstance(output, Tensor):
        return new
    if isinstance(output, Mapping):
        output[_place(output)] = new  # type: ignore[index]  # a ModelOutput of transformers, or a dict
        return output
    items = list(output)
    items[_place(output)] = new
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


@contextmanager
def patch(model: nn.Module, source: Mapping[str, Tensor | Sequence[Tensor]],
          positions: Positions | None = None, *, source_positions: Positions | None = None) -> Iterator[None]:
    """Activation patching: module outputs of another run take the place of this run's while the ``with`` block runs.

    ```python
    with capture(model, "model.layers.3") as clean:
        model(**inputs)
    with patch(model, clean, positions=-1):
        model(**corrupted)
    ```

    Args:
        model: the model.
        source: module name -> its output in the other run, (B, L, ...); B may be 1, for all rows. Or one tensor for
            each call of the module, as :func:`looseleaf.capture` gives them.
        positions: in this run: one, several, or (B, P) int64, those of each row. None: all of them.
        source_positions: in the other run, as many; None: the same.

    Raises:
        ValueError: an unknown module; or, from the model's forward, positions or shapes that do not fit, or more calls
            than the other run had.
    """
    if not source:
        raise ValueError("source: expected a mapping from module name to the output of another run, got none")
    if positions is None and source_positions is not None:
        raise ValueError("source_positions: expected positions with them, got source_positions alone")
    target = None if positions is None else _as_tensor(positions)
    origin = target if source_positions is None else _as_tensor(source_positions)
    with intervene(model, {name: _patcher(name, outputs, target, origin) for name, outputs in source.items()}):
        yield


def _patcher(name: str, outputs: Tensor | Sequence[Tensor], target: Tensor | None,
             origin: Tensor | None) -> Callable[[Tensor], Tensor]:
    calls = itertools.repeat(outputs) if isinstance(outputs, Tensor) else iter(outputs)

    def function(output: Tensor) -> Tensor:
        other = next(calls, None)
        if other is None:
            raise ValueError(f"{name}: expected {len(outputs)} calls, as in the other run, got call "
                             f"{len(outputs) + 1}: run the model as often as there")
        batch = len(output)
        if len(other) not in (1, batch) or other.shape[2:] != output.shape[2:]:
            raise ValueError(f"the other run's output of {name}: expected the shape {tuple(output.shape)} of this run "
                             f"but for the length, or a batch of 1, got {tuple(other.shape)}")
        other = other.to(output).expand(batch, *other.shape[1:])
        if target is None or origin is None:
            if other.shape != output.shape:
                raise ValueError(f"{name}: expected runs of one length, got {other.shape[1]} and {output.shape[1]}: "
                                 "pass positions, and source_positions where they differ")
            return other.clone()
        there = _checked(origin, other, name, "source_positions")
        here = _checked(target, output, name, "positions")
        if there.shape[1] != here.shape[1]:
            raise ValueError(f"source_positions: expected {here.shape[1]}, as many as positions, got {there.shape[1]}")
        rows = torch.arange(batch, device=output.device)[:, None]
        return output.index_put((rows, here), other[rows, there])

    return function


def _as_tensor(positions: Positions) -> Tensor:
    """(1 or B, P)."""
    out = torch.atleast_2d(torch.as_tensor(positions))
    if out.is_floating_point() or out.dim() > 2 or out.numel() == 0:
        raise ValueError(f"positions: expected an integer, a list of them, or a tensor (B, P), got {positions!r}")
    return out


def _checked(positions: Tensor, output: Tensor, name: str, what: str) -> Tensor:
    batch, length = output.shape[:2]
    if len(positions) not in (1, batch) or int(positions.min()) < -length or int(positions.max()) >= length:
        raise ValueError(f"{what} for {name}: expected integers in [{-length}, {length - 1}], one list or one for each "
                         f"of {batch} rows, got {positions.tolist()}")
    return positions.to(output.device).expand(batch, -1)


def first_tensor(output: Any, name: str = "the module") -> Tensor:
    """The first tensor of what a module returned: a tensor, a tuple or list, or a mapping.

    Raises:
        TypeError: there is none.
    """
    if isinstance(output, Tensor):
        return output
    place = _place(output)
    if place is None:
        raise TypeError(f"{name}: expected an output with a tensor in it, got {type(output).__name__}: choose another "
                        "module")
    return output[place]


def _place(output: Any) -> Any:
    """Key or index of the first tensor."""
    items = output.items() if isinstance(output, Mapping) else enumerate(
        output if isinstance(output, (tuple, list)) else ())
    return next((place for place, item in items if isinstance(item, Tensor)), None)


@contextmanager
def _hooked(model: nn.Module, hooks: Sequence[tuple[str, nn.Module, Callable[[str, Any], Any]]]) -> Iterator[None]:
    """Call ``hook(name, output)`` after each module; code that was compiled before would not."""
    called = False

    def function(name: str, hook: Callable[[str, Any], Any], module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal called
        called = True
        return hook(name, output)

    with uncompiled(model), ExitStack() as stack:
        for name, module, hook in hooks:
            stack.callback(module.register_forward_hook(partial(function, name, hook)).remove)
        yield
        dynamo = sys.modules.get("torch._dynamo.utils")
        if hooks and not called and dynamo is not None and dynamo.counters["frames"]:
            warnings.warn(f"{hooks[0][0]} was never called in the block. If the model ran there, then inside compiled "
                          "code, which calls no hooks: give capture, intervene or patch what torch.compile returned, "
                          "or set torch.compiler.set_stance('force_eager')", stacklevel=5)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run ``model`` uncompiled while the ``with`` block runs, for hooks of one's own: compiled code calls none."""
    compiled = any(_compiled(module) for module in model.modules())
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield


def _compiled(module: nn.Module) -> bool:
    """By ``torch.compile(module)``, ``module.compile()``, or ``module.forward = torch.compile(module.forward)``."""
    return (hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
            or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"))


__all__ = ["CaptureLimitError", "capture", "first_tensor", "intervene", "matching_modules", "patch", "uncompiled"]
