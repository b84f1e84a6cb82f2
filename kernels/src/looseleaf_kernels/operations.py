"""The public operations: which implementations each has, where they run, and which one is chosen."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IMPLEMENTATIONS = ("reference", "cpu", "triton")
ANYWHERE = ("cpu", "cuda")
"""The devices of an implementation in plain torch."""
_operations: dict[str, Operation] = {}
_forced: list[str] = []


@dataclass(frozen=True)
class Operation:
    """A public operation.

    Attributes:
        name: of the function in ``looseleaf_kernels`` and of the operator in ``torch.ops.looseleaf``.
        package: where its files lie.
        implementations: the devices of each implementation. ``cpu`` on ``cuda`` is plain torch that suits both.
        differentiable: whether it has a gradient.
        float64: the implementation for float64 where none is asked for.
        any_width: whether the Triton kernel takes a last dimension of any size, and not of 16 to 256 alone.
        triton_blocks: the smallest and the largest size, a power of two, of each kind of block in the Triton kernel.
    """

    name: str
    package: str
    implementations: Mapping[str, tuple[str, ...]]
    differentiable: bool = False
    float64: str = "cpu"
    any_width: bool = False
    triton_blocks: Mapping[str, tuple[int, float]] | None = None

    @property
    def operator(self) -> str:
        """The name in ``torch.library``."""
        return f"looseleaf::{self.name}"

    @property
    def anywhere(self) -> str:
        """The implementation in plain torch that runs on any device, the faster one where there are two."""
        return "cpu" if "cuda" in self.implementations["cpu"] else "reference"

    def module(self, implementation: str) -> Any:
        """The module of an implementation, imported when first needed."""
        return importlib.import_module(f"{self.package}.{implementation}")

    def choose(self, x: Tensor, impl: str | None = None, **blocks: int) -> str:
        """The implementation that runs: ``impl``, or the best one for a tensor (..., D) and blocks of these sizes.

        Raises:
            ValueError: ``impl`` is unknown, or is ``triton`` and does not take these blocks.
        """
        chosen = impl or implementation_for(self.name, x.device, x.dtype, x.shape[-1])[0]
        if chosen not in self.implementations:
            raise ValueError(f"impl: expected {either(self.implementations)}, got {impl!r}")
        limits = self.triton_blocks or {}
        if chosen == "triton" and any(size & (size - 1) or not limits[name][0] <= size <= limits[name][1]
                                      for name, size in blocks.items()):
            if impl == "triton":
                wanted = ", ".join(f"{name} >= {low}" if high == float("inf") else f"{name} in [{low}, {high}]"
                                   for name, (low, high) in limits.items())
                raise ValueError(f"blocks: expected powers of two with {wanted} for the Triton kernel, got "
                                 f"{' x '.join(map(str, blocks.values()))}; leave impl out to have one chosen")
            return self.anywhere
        return chosen


def register(operation: Operation) -> Operation:
    """Add an operation to :func:`operations`."""
    _operations[operation.name] = operation
    return operation


def operations() -> tuple[Operation, ...]:
    """All public operations, by name."""
    return tuple(_operations[name] for name in sorted(_operations))


def available_implementations(op: str) -> tuple[str, ...]:
    """The implementations that exist for an operation.

    Raises:
        ValueError: unknown operation.
    """
    return tuple(_operation(op).implementations)


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """Force one implementation inside a with-block: ``reference``, ``cpu`` or ``triton``.

    Raises:
        ValueError: unknown implementation.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected {either(IMPLEMENTATIONS)}, got {name!r}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def implementation_for(op: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """Which implementation runs, and why.

    Raises:
        ValueError: unknown operation, or LOOSELEAF_KERNELS holds an unknown name.
    """
    operation = _operation(op)
    forced = _forced[-1] if _forced else os.environ.get("LOOSELEAF_KERNELS", "")
    if forced and forced not in IMPLEMENTATIONS:
        raise ValueError(f"LOOSELEAF_KERNELS: expected {either(IMPLEMENTATIONS)}, got {forced!r}")
    if forced in operation.implementations:
        return forced, "forced"
    if dtype == torch.float64:
        runs = device.type in operation.implementations[operation.float64]
        return operation.float64 if runs else operation.anywhere, "float64 is for checking"
    if device.type == "cpu":
        return "cpu", "a CPU"
    if device.type != "cuda" or "triton" not in operation.implementations:
        return operation.anywhere, "plain torch"
    if importlib.util.find_spec("triton") is None:
        return operation.anywhere, "a GPU but no Triton: pip install triton"
    if not operation.any_width and not 16 <= head_dim <= 256:
        return operation.anywhere, f"head_dim {head_dim} is outside 16 to 256"
    return "triton", "a GPU and Triton are there"


def _operation(name: str) -> Operation:
    if name not in _operations:
        raise ValueError(f"op: expected {either(sorted(_operations))}, got {name!r}")
    return _operations[name]


def either(choices: Iterable[Any]) -> str:
    """``a, b or c``."""
    *first, last = map(str, choices)
    return f"{', '.join(first)} or {last}" if first else last
