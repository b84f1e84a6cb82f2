"""Activation patching: outputs of one run in place of another's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from looseleaf.probes.hooks import intervene


@contextmanager
def patch(model: nn.Module, source: Mapping[str, Tensor | Sequence[Tensor]],
          positions: int | Sequence[int] | Tensor | None = None, *,
          source_positions: int | Sequence[int] | Tensor | None = None) -> Iterator[None]:
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


def _as_tensor(positions: int | Sequence[int] | Tensor) -> Tensor:
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


__all__ = ["patch"]
