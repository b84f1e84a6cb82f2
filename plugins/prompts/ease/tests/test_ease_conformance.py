"""EASE passes the conformance kit, with the model's own embeddings and with an encoder that costs nothing."""

from __future__ import annotations

import numpy as np
import pytest

from looseleaf.testing import check_prompt_optimizer
from looseleaf_ease import EASE, Encoder


def letters(texts: list[str]) -> np.ndarray:
    """Counts of letters in the first and the second half of each text: order shows, nothing is called."""
    return np.array([[half.count(c) for half in (t[:len(t) // 2], t[len(t) // 2:]) for c in "abcdefghijklmnop"]
                     for t in texts], dtype=np.float32)


@pytest.mark.parametrize("encoder", ["model", letters])
def test_ease_conformance(encoder: str | Encoder) -> None:
    check_prompt_optimizer(EASE, lambda: EASE(k=3, encoder=encoder, total_iterations=24, n_init=8, domain=300, keep=8,
                                              hidden=16, train_steps=20))
