"""IgnoreTopK and PrimingProbe pass the conformance kits."""

import pytest

from looseleaf.testing import conformance_tests
from looseleaf_outlandish import IgnoreTopK, PrimingProbe

pytest.importorskip("transformers")

test_pruner = conformance_tests(IgnoreTopK, {
    "": {}, "global": {"make": lambda: IgnoreTopK(0.3, scope="global")},
    "at the end": {"make": lambda: IgnoreTopK(when="end")}})
test_probe = conformance_tests(PrimingProbe, {
    "": {}, "pruned": {"make": lambda: PrimingProbe(steps=2, samples=3, lr=1e-3, ignore_top_k=0.08)}})
