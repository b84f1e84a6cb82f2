"""Activation patching: outputs of one run in place of another's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf.probes.hooks import intervene, matching_modules


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
        positions: places in this run: one, several, or (B, P) int64, those of each row. None: all of them.
        source_positions: places in the other run, as many; None: the same places.

    Raises:
        ValueError: an unknown module; or, from the model's forward, places or shapes that do not fit, or more calls
            than the other run had.
    """
    if not source:
        raise ValueError("source is empty: allowed is a mapping from module name to the output of another run")
    for name in source:
        matching_modules(model, name)
    target = _places(positions)
    origin = target if source_positions is None else _places(source_positions)
    if (target is None) != (origin is None):
        raise ValueError("source_positions without positions: allowed is both, or positions alone")
    with intervene(model, {name: _patcher(name, outputs, target, origin) for name, outputs in source.items()}):
        yield


def _patcher(name: str, outputs: Tensor | Sequence[Tensor], target: Tensor | None,
             origin: Tensor | None) -> Callable[[Tensor], Tensor]:
    calls = 0

    def function(output: Tensor) -> Tensor:
        nonlocal calls
        if isinstance(outputs, Tensor):
            taken: Any = outputs
        elif calls < len(outputs):
            taken = outputs[calls]
        else:
            raise ValueError(f"{name} is called for the {calls + 1}. time, but the other run called it {len(outputs)} "
                             "times: run the model as often as there")
        calls += 1
        taken = taken.to(output)
        batch = len(output)
        if len(taken) not in (1, batch) or taken.shape[2:] != output.shape[2:]:
            raise ValueError(f"the other run's output of {name} has shape {tuple(taken.shape)}, this run's "
                             f"{tuple(output.shape)}: allowed is the same but for the length, and a batch of 1")
        taken = taken.expand(batch, *taken.shape[1:])
        if target is None or origin is None:
            if taken.shape != output.shape:
                raise ValueError(f"{name}: the runs have lengths {taken.shape[1]} and {output.shape[1]}: pass "
                                 "positions, and source_positions where they differ")
            return taken.clone()
        rows = torch.arange(batch, device=output.device)[:, None]
        there = _checked(origin, taken, name, "source_positions")
        here = _checked(target, output, name, "positions")
        if there.shape[1] != here.shape[1]:
            raise ValueError(f"{there.shape[1]} source_positions for {here.shape[1]} positions: allowed is as many")
        new = output.clone()
        new[rows, here] = taken[rows, there]
        return new

    return function


def _places(positions: int | Sequence[int] | Tensor | None) -> Tensor | None:
    """(1 or B, P)."""
    if positions is None:
        return None
    made = torch.as_tensor(positions)
    if made.is_floating_point() or made.dim() > 2 or made.numel() == 0:
        raise ValueError(f"positions={positions!r}: allowed is a whole number, a list of them, or a tensor (B, P)")
    return made.reshape(1, -1) if made.dim() < 2 else made


def _checked(places: Tensor, output: Tensor, name: str, what: str) -> Tensor:
    batch, length = output.shape[:2]
    if len(places) not in (1, batch) or int(places.min()) < -length or int(places.max()) >= length:
        raise ValueError(f"{what} {places.tolist()} for {name}: allowed are places from {-length} to {length - 1}, one "
                         f"list or one for each of {batch} rows")
    return places.to(output.device).expand(batch, -1)


__all__ = ["patch"]
