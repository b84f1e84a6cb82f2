"""Progress bars: on a terminal yes, in a log no."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import Any, TypeVar

T = TypeVar("T")


def track(items: Iterable[T], label: str, total: int | None = None, show: bool | None = None) -> Iterator[T]:
    """Iterate over ``items`` under a progress bar; ``show=None`` shows it only where stderr is a terminal."""
    with bar(label, total or length_hint(items) or None, show) as progress_bar:
        for item in items:
            yield item
            progress_bar.update()


def bar(label: str, total: int | None = None, show: bool | None = None) -> Any:
    """A tqdm bar (use it as a context manager), disabled where ``show`` or the terminal says so."""
    from tqdm.auto import tqdm

    shown = sys.stderr.isatty() if show is None else show
    return tqdm(total=total, desc=label, disable=not shown, leave=False, dynamic_ncols=True)
