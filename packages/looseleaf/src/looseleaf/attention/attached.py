"""A backend at work in a model: what it is given, what it recorded, and how the model gets its own attention back."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from looseleaf.attention.call import AttentionBackend, AttentionCall
from looseleaf.attention.watch import PLACE
from looseleaf.report import Report


@dataclass(eq=False, repr=False)
class Attached(AbstractContextManager["Attached"]):
    """A backend at work in a model. Use it in a ``with`` statement, or call :meth:`detach`.

    Attributes:
        backend: the attention backend.
        layers: name of each attention layer of the model, in the model's order.
        chosen: indices of the layers that go through the backend; the others stay exact.
        steps: number of denoising steps of a run, or None where it is unknown.
        chunked_prefill: several queries after a cache are a piece of a long prompt, not drafts to be verified.
        step: denoising step of the calls to come, from 0, or None. Set it in your own sampling loop; with diffusers it
            is found from the timesteps.
        context: name -> tensor (B, Lq) or (B, Lk), which backends find in ``call.context``. Set it before the forward;
            it is moved as the padding is. A layer where the length fits neither queries nor keys does not get it.
    """

    backend: AttentionBackend
    layers: list[str]
    chosen: set[int]
    steps: int | None = None
    chunked_prefill: bool = False
    step: int | None = field(default=None, init=False)
    context: dict[str, Tensor] = field(default_factory=dict, init=False)
    _calls: Any = field(default_factory=list, init=False)
    _states: dict[int, SimpleNamespace] = field(default_factory=dict, init=False)
    _undo: ExitStack = field(default_factory=ExitStack, init=False)
    _install: Callable[[Attached, ExitStack], None] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps: expected None or an integer >= 1, got {self.steps}")

    def __exit__(self, *error: object) -> None:
        self.detach()

    def begin(self, install: Callable[[Attached, ExitStack], None], undo: ExitStack) -> None:
        """Put the backend into the model with ``install``, until ``undo`` is closed."""
        self._install = install
        install(self, undo)
        undo.callback(_remember_recomputations)
        undo.callback(_working.remove, self)
        _working.append(self)
        _remember_recomputations()

    def detach(self) -> None:
        """Give the model its own attention back. Calling it again does nothing."""
        self._undo.close()

    def reset(self) -> None:
        """Forget the backend's state in every layer, all records, and the step."""
        self.step = None
        self._states.clear()
        self._calls.clear()

    @property
    def records(self) -> list[dict[str, Any]]:
        """One dictionary for each call: ``layer``, ``phase``, ``seconds``, and what the backend recorded.

        Tensors that were recorded become numbers and lists here, not before: a backend need not wait for the device.
        """
        return [{**{k: v.tolist() if isinstance(v, Tensor) else v for k, v in values.items()},
                 "seconds": _seconds(begin, end)} for values, begin, end in self._calls]

    def compute(self, call: AttentionCall, layer: int) -> Tensor:
        """Send one call to the backend, timed and recorded."""
        values: dict[str, Any] = {"layer": layer, "phase": call.phase}
        kind = call.query.device.type
        if torch.is_autocast_enabled(kind):  # as scaled_dot_product_attention does; rotary embeddings give fp32
            dtype = torch.get_autocast_dtype(kind)
            call.query, call.key, call.value = (x.to(dtype) for x in (call.query, call.key, call.value))
        call.layer, call.layers = self.position(layer)
        call.step, call.steps = self.step, self.steps
        call.state = self._states.setdefault(layer, SimpleNamespace())
        call.record = values.update
        with self._timed(values, call.query.device):
            return self.backend.compute(call)

    def position(self, layer: int) -> tuple[int, int]:
        """Index of a layer in its model, and how many that has."""
        return layer, len(self.layers)

    def was_there(self) -> bool:
        """False where the backward pass repeats a forward that ran without this backend, such as one before attach."""
        if torch._C._current_graph_task_id() == -1:  # no backward pass
            return True
        present, frame = getattr(_thread, "present", None), sys._getframe()
        while present is None and frame and frame.f_code.co_filename != checkpoint.__file__:
            frame = frame.f_back  # type: ignore[assignment]
        return not frame if present is None else self in present

    def exactly(self, layer: int, phase: str, reason: str, device: torch.device, function: Callable[[], Any]) -> Any:
        """The model's own attention for one call, timed, and counted as a fallback for ``reason``."""
        with self._timed({"layer": layer, "phase": phase, "fallback": reason}, device):
            return function()

    @contextmanager
    def _timed(self, values: dict[str, Any], device: torch.device) -> Iterator[None]:
        begin = _now(device)
        yield
        self._calls.append((values, begin, _now(device)))

    def report(self) -> Report:
        """Calls, time, density, patterns and fallbacks of each layer."""
        records, name = self.records, type(self.backend).__name__

        def recorded(kind: Any, *others: str) -> list[str]:
            return list(dict.fromkeys(
                k for r in records for k, v in r.items() if isinstance(v, kind) and k not in others))

        numbers, texts = recorded((int, float), "layer", "seconds"), recorded(str, "phase", "fallback")
        fallbacks = Counter(r["fallback"] for r in records if "fallback" in r)
        report = Report(f"{name} in {len(self.chosen)} of {len(self.layers)} layers", {
            "backend": name, **self.backend.hyperparameters(), "calls": len(records),
            "calls that fell back to exact attention": fallbacks.total(),
            "seconds in attention": sum(r["seconds"] for r in records)})
        table = report.table("Layers", ["layer", "name", "calls", "fallbacks", "seconds", *numbers, *texts],
                             note="numbers are means over the calls that recorded them")
        by_layer = {layer: [r for r in records if r["layer"] == layer] for layer in range(len(self.layers))}
        for layer, calls in by_layer.items():
            if calls:
                means = [[float(r[key]) for r in calls if key in r] for key in numbers]
                counts = [Counter(r[key] for r in calls if key in r) for key in texts]
                table.add(layer, self.layers[layer], len(calls), sum("fallback" in r for r in calls),
                          sum(r["seconds"] for r in calls), *(fmean(values) if values else None for values in means),
                          *(", ".join(f"{n} x {text}" if count.total() > 1 else text for text, n in count.items())
                            or None for count in counts))
        for key in recorded(list):
            rows = {layer: [r[key] for r in calls if key in r] for layer, calls in by_layer.items()}
            report.figure(key.replace("_", " "), x_label="head", y_label="layer",
                          image=[[fmean(column) for column in zip(*values)] for values in rows.values() if values],
                          note=f"layers {', '.join(str(layer) for layer, values in rows.items() if values)}")
        if fallbacks:
            report.table("Fallbacks to exact attention", ["reason", "calls"], list(fallbacks.items()))
        return report


Place: TypeAlias = "tuple[Attached, int]"
Shifts: TypeAlias = "Sequence[int] | None"
_working: list[Attached] = []
_thread = threading.local()  # present: the backends that were at work in the forward that is repeated now


def place_of(module: nn.Module) -> Place | None:
    """Whose call a module's is, and which layer it is; None for modules of no attached model."""
    return vars(module).get(PLACE)


# ---------------------------------------------------------------------- gradient checkpointing
def _recomputed(function: Callable[..., Any], runs: int) -> Callable[..., Any]:
    """``function``, with attention as it is now from the second run on; ``runs``: how many there were.

    The backward pass may come when the backend is detached, or at a later denoising step.
    """
    count = itertools.count(runs)
    # A call that is repeated is not recorded twice.
    present = [(attached, {
        **vars(attached), "context": dict(attached.context), "_calls": [],
        "_states": {layer: SimpleNamespace(**vars(state)) for layer, state in attached._states.items()}})
        for attached in _working]

    def run(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as undo:
            if not next(count):
                return function(*args, **kwargs)
            undo.callback(setattr, _thread, "present", getattr(_thread, "present", None))
            _thread.present = [attached for attached, _ in present]
            for attached, attributes in present:
                undo.callback(vars(attached).update, dict(vars(attached)))
                vars(attached).update(attributes)
                if attached not in _working and attached._install is not None:
                    attached.begin(attached._install, undo)
            return function(*args, **kwargs)

    return run


# What torch calls a function with under checkpointing: in both passes, and in the backward pass only.
_BOTH, _BACKWARD = "CheckpointFunction", "_checkpoint_without_reentrant_generator"
_ORIGINAL: dict[str, Any] = {name: getattr(checkpoint, name) for name in (_BOTH, _BACKWARD)}
_OURS = {_BOTH: SimpleNamespace(apply=lambda function, *args: _ORIGINAL[_BOTH].apply(_recomputed(function, 0), *args)),
         _BACKWARD: lambda function, *args, **kwargs: _ORIGINAL[_BACKWARD](_recomputed(function, 1), *args, **kwargs)}


def _remember_recomputations() -> None:
    """Stand between torch's checkpointing, which offers no public way, and what it runs while backends are at work."""
    for name, function in (_OURS if _working else _ORIGINAL).items():
        setattr(checkpoint, name, function)


# ---------------------------------------------------------------------- context
def shifted(x: Tensor, shifts: Shifts, dim: int) -> Tensor:
    """Each batch item's rows (along ``dim`` of an item) moved to the beginning by its shift, around the end."""
    if shifts is None:
        return x
    items = x.expand(len(shifts), *x.shape[1:])
    return torch.stack([item.roll(-shift, dim) if shift else item for item, shift in zip(items, shifts)])


def moved_context(context: Mapping[str, Tensor], batch: int, queries: int, keys: int, query_shift: Shifts = None,
                  key_shift: Shifts = None) -> dict[str, Tensor]:
    """What of ``context`` belongs to a call, moved as its queries or keys were."""
    out = {}
    for name, tensor in context.items():
        if tensor.dim() != 2:
            raise ValueError(f"context[{name!r}]: expected (B, Lq) or (B, Lk), got {tuple(tensor.shape)}")
        length = tensor.shape[1]
        if length not in (queries, keys):
            continue
        if batch % tensor.shape[0]:
            raise ValueError(f"context[{name!r}]: expected a batch of {batch}, got {tensor.shape[0]}")
        if queries == keys and query_shift != key_shift:
            raise ValueError(f"context[{name!r}]: expected another number of keys than queries where only one of them "
                             f"is padded on the left, got {length} of both: pad the keys on the right")
        # generate() repeats each item for its beams.
        tensor = tensor.repeat_interleave(batch // tensor.shape[0], 0)
        out[name] = shifted(tensor, query_shift if length == queries else key_shift, 0)
    return out


def _now(device: torch.device) -> Any:
    """This moment, in seconds or as an event that the device will reach."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: Any, end: Any) -> float:
    """Time between two moments; waits for the device if need be."""
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
