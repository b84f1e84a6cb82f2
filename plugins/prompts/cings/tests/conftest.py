"""What all tests of this plugin share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def little_garbage() -> Iterator[None]:
    """The trainer of transformers collects garbage whenever it begins: not among all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()
