"""EASE passes the conformance kit, with the model's own embeddings and with an encoder that costs nothing."""

from __future__ import annotations

import dataclasses

import numpy as np

from looseleaf.testing import conformance_tests
from looseleaf_ease import EASE


def letters(texts: list[str]) -> np.ndarray:
    """Counts of letters in the first and the second half of each text: order shows, nothing is called."""
    return np.array([[half.count(c) for half in (t[:len(t) // 2], t[len(t) // 2:]) for c in "abcdefghijklmnop"]
                     for t in texts], dtype=np.float32)


test_conformance = conformance_tests(EASE, {
    "the model's own": {}, "a function": {"make": lambda: dataclasses.replace(EASE.conformance()["make"](),
                                                                              encoder=letters)}})
