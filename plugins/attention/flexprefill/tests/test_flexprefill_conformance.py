"""FlexPrefill passes the conformance kit."""

from looseleaf.testing import check_attention_backend
from looseleaf_flexprefill import FlexPrefill


def test_conformance() -> None:
    check_attention_backend(FlexPrefill, lambda: FlexPrefill(gamma=0.6, min_budget=16, block_size=16))
