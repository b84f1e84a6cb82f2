"""Timing that survives a busy machine: alternatives take turns, and medians of paired ratios are reported."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from looseleaf.statistics import bootstrap


@dataclasses.dataclass
class Timing:
    """Seconds of several functions measured in turns.

    Attributes:
        seconds: name -> seconds of each round; the i-th entries of all names were measured next to each other.
    """

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds of a call."""
        return float(np.median(self.seconds[name]))

    def ratio(self, name: str, baseline: str, seed: int = 0) -> tuple[float, float, float]:
        """(median, low, high) of seconds of ``baseline`` over seconds of ``name``, round by round.

        Above 1: ``name`` is faster. The interval is a 95 % bootstrap of the median over rounds.
        """
        pairs = [b / a for a, b in zip(self.seconds[name], self.seconds[baseline], strict=True)]
        return bootstrap(pairs, seed, statistic=lambda rows: np.median(rows, -1))


def interleave(functions: Mapping[str, Callable[[], Any]], rounds: int = 5, warmup: int = 1, *,
               around: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None) -> Timing:
    """Call every function once a round, in an order that reverses from round to round.

    What slows the machine for a while then slows all of them alike, which separate loops would not give.

    Args:
        functions: name -> what to time; results are dropped.
        rounds: timed rounds.
        warmup: rounds before the timed ones.
        around: name -> maker of a context manager that is entered before and left after each timing of that name.

    Raises:
        ValueError: nothing to time, or rounds below 1.
    """
    if not functions or rounds < 1 or warmup < 0:
        raise ValueError("interleave: expected a function or more, rounds >= 1 and warmup >= 0, "
                         f"got {len(functions)} functions, rounds={rounds}, warmup={warmup}")
    around = around or {}
    for _ in range(warmup):
        for name, function in functions.items():
            with around.get(name, contextlib.nullcontext)():
                function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions.items())
    for turn in range(rounds):
        for name, function in order if turn % 2 == 0 else reversed(order):
            with around.get(name, contextlib.nullcontext)():
                seconds[name].append(timed(function))
    return Timing(seconds)


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call, with the work on accelerators finished."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait until accelerators have done what was asked of them; nothing where torch was not imported."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


@dataclasses.dataclass
class Peak:
    """Peak memory of a block. ``bytes`` is above what was in use when the block began."""

    bytes: int = 0
    device: str = "cpu"


@contextlib.contextmanager
def peak_memory(every: float = 0.005) -> Iterator[Peak]:
    """Measure the peak memory of a ``with`` block, beyond what was in use at its start.

    On CUDA and ROCm the allocator's own count is read. On the CPU it is the resident memory of the process: the high
    mark that Linux keeps, where it lets us reset it, and samples ``every`` so many seconds from another thread (Linux;
    elsewhere 0), which can miss short spikes. What the allocator keeps of earlier blocks is given back first where the
    C library can (glibc); elsewhere it is not counted again.
    """
    peak = Peak()
    torch = sys.modules.get("torch")
    gc.collect()
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        peak.device = "cuda"
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            yield peak
        finally:
            torch.cuda.synchronize()
            peak.bytes = max(0, torch.cuda.max_memory_allocated() - before)
        return
    _trim()
    before = resident_bytes()
    kernel_counts = _reset_high_mark()
    stop = threading.Event()

    def watch() -> None:
        while True:
            peak.bytes = max(peak.bytes, resident_bytes() - before)
            if stop.wait(every):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        peak.bytes = max(peak.bytes, (_high_mark() if kernel_counts else resident_bytes()) - before)


def _trim() -> None:
    import ctypes

    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_mark() -> bool:
    """Let Linux begin anew with the highest resident memory of this process; False where it does not."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return _high_mark() > 0


def _high_mark() -> int:
    """Highest resident memory of this process since the last reset, in bytes; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    import resource

    return pages * resource.getpagesize()
