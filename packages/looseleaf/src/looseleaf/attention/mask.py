"""A mask that is computed row by row, so that nobody has to hold an L x L matrix."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class LazyMask:
    """What a boolean mask of shape (B, 1 or H, Lq, Lk) says, made only where it is asked for.

    Args:
        rows: ``rows(start, stop)`` gives the boolean mask of query rows ``start`` to ``stop``, (B, 1 or H, n, Lk);
            True: attend.
        length: Lq.
        first_key: ``first_key(row)`` is a key below which no query from ``row`` on attends to anything (0 if unknown),
            so that a sliding window costs what its window costs.
    """

    def __init__(self, rows: Callable[[int, int], Tensor], length: int,
                 first_key: Callable[[int], int] | None = None) -> None:
        self.rows = rows
        self.length = length
        self.first_key = first_key or (lambda row: 0)

    def dense(self) -> Tensor:
        """The whole mask; for small inputs and tests."""
        return self.rows(0, self.length)
