"""MagnitudePruner passes the conformance kit."""

import pytest

from looseleaf.testing import check_pruner
from looseleaf_essential_sparsity import MagnitudePruner


@pytest.mark.parametrize("fields", [{}, {"scope": "layer", "sparsity": 0.3}, {"pattern": "2:4"}, {"pattern": "4:8"},
                                    {"sparsity": 0.99}])
def test_conformance(fields: dict) -> None:
    check_pruner(MagnitudePruner, lambda: MagnitudePruner(**fields))
