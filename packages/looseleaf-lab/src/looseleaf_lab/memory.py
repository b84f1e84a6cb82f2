"""Memory of a training step, measured in three ways that see different things.

| figure | what is in it | what is not |
|---|---|---|
| saved | what the graph keeps for the backward at the end of the forward, each storage once | parameters and buffers; what a function keeps otherwise than by ``save_for_backward``, or under hooks of its own; what a recomputation makes again in the backward |
| live | the most bytes of tensors made by the step that were alive at the same time, in forward and backward | temporary memory inside an operation; what was there before, parameters among it |
| resident | the highest resident memory of the process beyond that before the step | nothing, but the allocator's slack is in it |

A process that has run another variant before has its memory at hand and shows less: use :func:`in_fresh_process`.
"""  # noqa: E501 (a table)

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from looseleaf_lab.timing import peak_memory

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one training step, see the module's table.

    Attributes:
        saved: kept for the backward at the end of the forward.
        live: highest sum of tensors that the step made.
        live_forward: the same of the forward alone.
        resident: highest resident memory of the process, or of the allocator on a GPU, beyond that before the step.
    """

    saved: int
    live: int
    live_forward: int
    resident: int


class _Kept:
    """What takes the place of a saved tensor in the graph: it lives as long as the graph does."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedTensors:
    """Tensors that are kept for the backward, while :meth:`watched` is on. Only first derivatives go through what was
    recorded meanwhile."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self._own = {_storage(t) for t in (*model.parameters(), *model.buffers())} if model is not None else set()
        self._kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    @contextlib.contextmanager
    def watched(self) -> Iterator[SavedTensors]:
        """See what is saved in the ``with`` block."""
        def pack(tensor: Tensor) -> _Kept:
            kept = _Kept(tensor if tensor.is_leaf else tensor.detach())  # an output would keep its own graph alive
            self._kept.add(kept)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            yield self

    def bytes(self) -> int:
        """Of the storages of what is still kept, each once, without those of the model."""
        sizes = {_storage(kept.tensor): kept.tensor.untyped_storage().nbytes() for kept in self._kept}
        return sum(size for storage, size in sizes.items() if storage not in self._own)


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors that were made in the ``with`` block and are alive: ``now``, and ``peak`` so far.

    A storage counts from the operation that makes it until it is freed, whoever looks at it; what an operation is
    given was there before. Temporary memory inside an operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_iter((args, kwargs)):
            self._meet(tensor, 0)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            self._meet(tensor, None)
        return out

    def _meet(self, tensor: Any, size: int | None) -> None:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known and self._known[key]() is storage:
            return
        size = storage.nbytes() if size is None else size

        def forget(reference: Any, key: int = key, size: int = size) -> None:
            self.now -= size
            if self._known.get(key) is reference:
                del self._known[key]

        self._known[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


def step_memory(model: nn.Module, loss: Callable[[], Tensor]) -> Memory:
    """Memory of one forward and backward; gradients of the model are None before and after.

    Args:
        model: its parameters and buffers count for nothing, their gradients do.
        loss: runs the forward and gives a scalar.
    """
    model.zero_grad(set_to_none=True)
    saved, live = SavedTensors(model), LiveTensors()
    with peak_memory() as peak, live:
        with saved.watched():
            value = loss()
        kept, forward = saved.bytes(), live.peak
        value.backward()  # type: ignore[no-untyped-call]
        del value
    model.zero_grad(set_to_none=True)
    return Memory(kept, live.peak, forward, peak.bytes)


def in_fresh_process(function: Callable[..., T], *args: Any) -> T:
    """``function(*args)`` in a Python process of its own, with as many threads as here.

    Args:
        function: of an importable module.
        args: what can be pickled, as must be the result.

    Raises:
        Exception: whatever the function raises; ``BrokenProcessPool`` where the process died.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads,
                             (torch.get_num_threads(),)) as pool:
        return pool.submit(function, *args).result()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


__all__ = ["LiveTensors", "Memory", "SavedTensors", "in_fresh_process", "step_memory"]
