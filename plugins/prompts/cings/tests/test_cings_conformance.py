"""CInGS passes the conformance kit."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from looseleaf.testing import conformance_tests
from looseleaf_cings import CInGS

test_conformance = conformance_tests(CInGS)


@pytest.fixture(autouse=True, scope="module")
def little_garbage() -> Iterator[None]:
    """The trainer of transformers collects garbage whenever it begins: not among all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()
