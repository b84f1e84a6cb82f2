"""``attach``: put an attention backend into somebody's model, and take it out again."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from types import SimpleNamespace, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf.attention.call import AttentionBackend, AttentionCall
from looseleaf.errors import UnsupportedModelError
from looseleaf.report import Cell, Report


class Attached:
    """A backend at work in a model. Use it in a ``with`` statement, or call :meth:`detach`.

    Attributes:
        backend: the attention backend.
        layers: name of each attention layer of the model, in the model's order.
        chosen: indices of the layers that go through the backend; the others stay exact.
        step: denoising step of the calls to come, from 0, or None. Set it in your own sampling loop; with diffusers it
            is found from the timesteps.
        steps: number of denoising steps of a run, or None where nobody said.
    """

    def __init__(self, backend: AttentionBackend, layers: list[str], chosen: set[int],
                 steps: int | None = None) -> None:
        if steps is not None and steps < 1:
            raise ValueError(f"steps={steps}: allowed is None, or a whole number from 1")
        self.backend = backend
        self.step: int | None = None
        self.steps = steps
        self.layers = layers
        self.chosen = chosen
        self._states: dict[int, SimpleNamespace] = {}
        self._calls: list[tuple[dict[str, Any], Callable[[], float]]] = []
        self._undo: list[Callable[[], Any]] = []

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.detach()

    def detach(self) -> None:
        """Give the model its own attention back. Calling it again does nothing."""
        undo, self._undo = self._undo, []
        for step in reversed(undo):
            step()

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
        call.layer, call.layers, call.step, call.steps = layer, len(self.layers), self.step, self.steps
        call.state = self._states.setdefault(layer, SimpleNamespace())
        call.record = lambda **given: values.update(given)
        stop = _stopwatch(call.query.device)
        out = self.backend.compute(call)
        self._calls.append((values, stop()))
        return out

    def report(self) -> Report:
        """Calls, time, density, patterns and fallbacks of each layer."""
        records = self.records
        report = Report(f"{type(self.backend).__name__} in {len(self.chosen)} of {len(self.layers)} layers")
        report.facts = {"backend": type(self.backend).__name__, **self.backend.hyperparameters()}
        report.facts["calls"] = len(records)
        report.facts["calls that fell back to exact attention"] = sum("fallback" in r for r in records)
        report.facts["seconds in attention"] = sum(r["seconds"] for r in records)
        numbers = list(dict.fromkeys(k for r in records for k, v in r.items()
                                     if isinstance(v, (int, float)) and k not in ("layer", "seconds")))
        texts = list(dict.fromkeys(k for r in records for k, v in r.items()
                                   if isinstance(v, str) and k not in ("phase", "fallback")))
        table = report.table("Layers", ["layer", "name", "calls", "fallbacks", "seconds", *numbers, *texts],
                             note="numbers are means over the calls that recorded them")
        for layer, name in enumerate(self.layers):
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
            rows = [[r[key] for r in records if r["layer"] == layer and key in r] for layer in range(len(self.layers))]
            means = [[sum(column) / len(column) for column in zip(*of_layer)] for of_layer in rows if of_layer]
            report.figure(key.replace("_", " "), x_label="head", y_label="layer", image=means,
                          note=f"layers {', '.join(str(i) for i, of_layer in enumerate(rows) if of_layer)}")
        reasons = [r["fallback"] for r in records if "fallback" in r]
        if reasons:
            report.table("Fallbacks to exact attention", ["reason", "calls"],
                         [[reason, reasons.count(reason)] for reason in dict.fromkeys(reasons)])
        return report


def attach(model: Any, backend: AttentionBackend, layers: Sequence[int | str] | None = None, *,
           steps: int | None = None) -> Attached:
    """Let ``backend`` compute the attention of ``model`` until :meth:`Attached.detach` or the end of ``with``.

    Args:
        model: a transformers model whose attention goes through ``AttentionInterface`` (decoders, BERT-like encoders,
            ViT, CLIP ...), or a diffusers pipeline or model with attention processors.
        backend: what computes the attention.
        layers: indices, names or name patterns (``"*.layers.3.*"``) of the layers to change; None: all. Layers with a
            sliding window of their own are left exact always.
        steps: number of denoising steps of a run, for methods that change with them. In your own sampling loop also
            set ``attached.step`` before each step; diffusers pipelines say both by themselves.

    Raises:
        UnsupportedModelError: the model offers no way to exchange its attention, or has a backend attached already.
        ValueError: an unknown layer; near names are given.
    """
    if not isinstance(backend, AttentionBackend):
        given = f"the class {backend.__name__}" if isinstance(backend, type) else type(backend).__name__
        raise TypeError(f"backend is {given}: allowed is an instance of an AttentionBackend, such as "
                        "SlidingWindow(window=1024)")
    from looseleaf.attention import diffusion, huggingface

    for way in (huggingface, diffusion):
        names = way.attention_layers(model)
        if names is not None:
            if not names:
                break
            attached = Attached(backend, list(names), choose(list(names), layers), steps)
            try:
                way.install(model, attached)
            except BaseException:
                attached.detach()
                raise
            return attached
    raise UnsupportedModelError(
        f"{type(model).__name__} offers no way to exchange its attention: allowed is a transformers model whose "
        "attention goes through AttentionInterface, or a diffusers model with attention processors. For a model of "
        "your own, call the backend like torch.nn.functional.scaled_dot_product_attention")


def choose(names: list[str], wanted: Sequence[int | str] | None) -> set[int]:
    """Indices of the layers that ``wanted`` means.

    Raises:
        ValueError: an index out of range or a pattern without a match.
    """
    if wanted is None:
        return set(range(len(names)))
    if isinstance(wanted, (str, int)):
        wanted = [wanted]
    out: set[int] = set()
    for item in wanted:
        if isinstance(item, int):
            if not -len(names) <= item < len(names):
                raise ValueError(f"layer {item}: allowed is {-len(names)} to {len(names) - 1}")
            out.add(item % len(names))
            continue
        found = [i for i, name in enumerate(names) if fnmatch.fnmatchcase(name, item)]
        if not found:
            near = get_close_matches(item, names, 3, 0.3) or names[:3]
            raise ValueError(f"no attention layer matches {item!r}: near names are {', '.join(near)}")
        out.update(found)
    return out


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
        taken = time.perf_counter() - start
        return lambda: taken

    return stop


def leaf_modules(model: nn.Module, word: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose class name has ``word`` in it and none of whose children's has."""
    for name, module in model.named_modules():
        if word in type(module).__name__ and not any(
                word in type(child).__name__ for other, child in module.named_modules() if other):
            yield name, module
