"""A backend at work in a model: what it is given, what it recorded, and how the model gets its own attention back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import SimpleNamespace, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from looseleaf.attention.call import AttentionBackend, AttentionCall
from looseleaf.attention.watch import PLACE
from looseleaf.report import Cell, Report


class Attached:
    """A backend at work in a model. Use it in a ``with`` statement, or call :meth:`detach`.

    Attributes:
        backend: the attention backend.
        layers: name of each attention layer of the model, in the model's order.
        chosen: indices of the layers that go through the backend; the others stay exact.
        step: denoising step of the calls to come, from 0, or None. Set it in your own sampling loop; with diffusers it
            is found from the timesteps.
        steps: number of denoising steps of a run, or None where it is unknown.
        context: name -> tensor (B, Lq) or (B, Lk), which backends find in ``call.context``. Set it before the forward;
            it is moved as the padding is. A layer where the length fits neither queries nor keys does not get it.
        chunked_prefill: several queries after a cache are a piece of a long prompt, not drafts to be verified.
    """

    def __init__(self, backend: AttentionBackend, layers: list[str], chosen: Iterable[int], *,
                 steps: int | None = None, chunked_prefill: bool = False, total: int | None = None) -> None:
        if steps is not None and steps < 1:
            raise ValueError(f"steps: expected None or an integer >= 1, got {steps}")
        self.backend = backend
        self.layers = layers
        self.chosen = set(chosen)
        self.step: int | None = None
        self.steps = steps
        self.context: dict[str, Tensor] = {}
        self.chunked_prefill = chunked_prefill
        self._total = total
        self._states: dict[int, SimpleNamespace] = {}
        self._calls: Any = []
        self._undo = ExitStack()
        self._install: Callable[[Attached, ExitStack], None] | None = None

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.detach()

    def begin(self, install: Callable[[Attached, ExitStack], None]) -> None:
        """Put the backend into the model; :meth:`detach` is the way back.

        Args:
            install: does it, and puts each step of the way back on the stack that it is given.
        """
        self._install = install
        try:
            install(self, self._undo)
            self._undo.callback(_remember_recomputations)
            self._undo.callback(_working.remove, self)
            _working.append(self)
            _remember_recomputations()
        except BaseException:
            self.detach()
            raise

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
        return [{**{k: v.tolist() if isinstance(v, Tensor) else v for k, v in values.items()}, "seconds": seconds()}
                for values, seconds in self._calls]

    def compute(self, call: AttentionCall, layer: int) -> Tensor:
        """Send one call to the backend, timed and recorded."""
        values: dict[str, Any] = {"layer": layer, "phase": call.phase}
        kind = call.query.device.type
        if torch.is_autocast_enabled(kind):  # as scaled_dot_product_attention does; rotary embeddings give fp32
            dtype = torch.get_autocast_dtype(kind)
            call.query, call.key, call.value = (x.to(dtype) for x in (call.query, call.key, call.value))
        call.layer, call.layers = layer, self._total or len(self.layers)
        call.step, call.steps = self.step, self.steps
        call.state = self._states.setdefault(layer, SimpleNamespace())
        call.record = lambda **recorded: values.update(recorded)
        return self._timed(values, call.query.device, lambda: self.backend.compute(call))

    def exactly(self, layer: int, phase: str, reason: str, device: torch.device,
                function: Callable[[], Any]) -> Any:
        """The model's own attention for one call, timed, and counted as a fallback for ``reason``."""
        return self._timed({"layer": layer, "phase": phase, "fallback": reason}, device, function)

    def _timed(self, values: dict[str, Any], device: torch.device, function: Callable[[], Any]) -> Any:
        stop = _stopwatch(device)
        out = function()
        self._calls.append((values, stop()))
        return out

    def report(self) -> Report:
        """Calls, time, density, patterns and fallbacks of each layer."""
        return make_report(self.backend, self.layers, len(self.chosen), self.records)

    # ------------------------------------------------------------------ gradient checkpointing
    def remember(self) -> Callable[[ExitStack], None]:
        """What brings the present back for a recomputation: on the given stack the backend is at work as it is now."""
        now = {"step": self.step, "steps": self.steps, "context": dict(self.context),
               "_states": {layer: SimpleNamespace(**vars(state)) for layer, state in self._states.items()}}

        def bring_back(undo: ExitStack) -> None:
            former = {name: getattr(self, name) for name in (*now, "_calls")}
            undo.callback(self.__dict__.update, former)
            self.__dict__.update({**now, "_calls": []})  # a call that is repeated is not recorded twice
            if self not in _working and self._install is not None:
                self._install(self, undo)

        return bring_back


_working: list[Attached] = []
"""The attachments whose forward passes may have to be recomputed."""


def has_backend(module: nn.Module) -> bool:
    """Whether :func:`looseleaf.attach` has put a backend into ``module``."""
    place = module.__dict__.get(PLACE)
    return place is not None and place[0] in _working


class _Recomputed:
    """A function under gradient checkpointing: when it is run again, attention is what it was.

    The backward pass may come when the backend is detached, or at a later denoising step.
    """

    def __init__(self, function: Callable[..., Any], *, ran: bool) -> None:
        self.function, self.ran = function, ran
        self.brought_back = [attached.remember() for attached in _working]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.ran:
            self.ran = True
            return self.function(*args, **kwargs)
        with ExitStack() as undo:
            for bring_back in self.brought_back:
                bring_back(undo)
            return self.function(*args, **kwargs)


# What torch calls a function with under checkpointing: in both passes, and in the backward pass only.
_BOTH, _BACKWARD = "CheckpointFunction", "_checkpoint_without_reentrant_generator"
_ORIGINAL: dict[str, Any] = {name: getattr(checkpoint, name) for name in (_BOTH, _BACKWARD)}
_OURS = {_BOTH: SimpleNamespace(apply=lambda function, *args: _ORIGINAL[_BOTH].apply(
             _Recomputed(function, ran=False), *args)),
         _BACKWARD: lambda function, *args, **kwargs: _ORIGINAL[_BACKWARD](
             _Recomputed(function, ran=True), *args, **kwargs)}


def _remember_recomputations() -> None:
    """Stand between torch's checkpointing and the functions it runs while any backend is at work.

    Every library's checkpointing ends in ``torch.utils.checkpoint``, which offers no public way to do so.
    """
    for name, function in (_OURS if _working else _ORIGINAL).items():
        setattr(checkpoint, name, function)


# ---------------------------------------------------------------------- context
def shifted(x: Tensor, shifts: Sequence[int], dim: int) -> Tensor:
    """Each batch item's rows (along ``dim`` of an item) moved to the beginning by its shift, around the end."""
    return torch.stack([item if s == 0 else item.roll(-s, dim) for item, s in zip(x, shifts, strict=True)])


def moved_context(context: Mapping[str, Tensor], batch: int, queries: int, keys: int,
                  query_shift: Sequence[int] | None, key_shift: Sequence[int] | None) -> dict[str, Tensor]:
    """What of ``context`` belongs to a call, moved as its queries or keys were.

    Raises:
        ValueError: a tensor does not fit the batch, or it cannot be told whether it belongs to queries or keys.
    """
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
        shifts = query_shift if length == queries else key_shift
        out[name] = tensor if shifts is None else shifted(tensor, shifts, 0)
    return out


# ---------------------------------------------------------------------- report
def make_report(backend: AttentionBackend, layers: Sequence[str], chosen: int,
                records: Sequence[Mapping[str, Any]]) -> Report:
    """Calls, time, density, patterns and fallbacks of each layer.

    Args:
        backend: whose records they are.
        layers: name of each layer.
        chosen: how many of them went through the backend.
        records: as in :attr:`Attached.records`.
    """
    report = Report(f"{type(backend).__name__} in {chosen} of {len(layers)} layers")
    report.facts = {"backend": type(backend).__name__, **backend.hyperparameters()}
    report.facts["calls"] = len(records)
    report.facts["calls that fell back to exact attention"] = sum("fallback" in r for r in records)
    report.facts["seconds in attention"] = sum(r["seconds"] for r in records)
    numbers = list(dict.fromkeys(k for r in records for k, v in r.items()
                                 if isinstance(v, (int, float)) and k not in ("layer", "seconds")))
    texts = list(dict.fromkeys(k for r in records for k, v in r.items()
                               if isinstance(v, str) and k not in ("phase", "fallback")))
    table = report.table("Layers", ["layer", "name", "calls", "fallbacks", "seconds", *numbers, *texts],
                         note="numbers are means over the calls that recorded them")
    for layer, name in enumerate(layers):
        of_layer = [r for r in records if r["layer"] == layer]
        if not of_layer:
            continue
        row: list[Cell] = [layer, name, len(of_layer), sum("fallback" in r for r in of_layer),
                           sum(r["seconds"] for r in of_layer)]
        for key in numbers:
            values = [float(r[key]) for r in of_layer if key in r]
            row.append(sum(values) / len(values) if values else None)
        for key in texts:
            found = [r[key] for r in of_layer if key in r]
            row.append(", ".join(f"{found.count(t)} x {t}" if len(found) > 1 else t
                                 for t in dict.fromkeys(found)) or None)
        table.add(*row)
    for key in dict.fromkeys(k for r in records for k, v in r.items() if isinstance(v, list)):
        rows = [[r[key] for r in records if r["layer"] == layer and key in r] for layer in range(len(layers))]
        means = [[sum(column) / len(column) for column in zip(*of_layer)] for of_layer in rows if of_layer]
        report.figure(key.replace("_", " "), x_label="head", y_label="layer", image=means,
                      note=f"layers {', '.join(str(i) for i, of_layer in enumerate(rows) if of_layer)}")
    reasons = [r["fallback"] for r in records if "fallback" in r]
    if reasons:
        report.table("Fallbacks to exact attention", ["reason", "calls"],
                     [[reason, reasons.count(reason)] for reason in dict.fromkeys(reasons)])
    return report


def _stopwatch(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Started now; calling it stops it and gives a function for the seconds, which waits for the device if need be."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()

        def stop_events() -> Callable[[], float]:
            end.record()

            def seconds() -> float:
                end.synchronize()
                return begin.elapsed_time(end) / 1000

            return seconds

        return stop_events
    start = time.perf_counter()

    def stop() -> Callable[[], float]:
        elapsed = time.perf_counter() - start
        return lambda: elapsed

    return stop
