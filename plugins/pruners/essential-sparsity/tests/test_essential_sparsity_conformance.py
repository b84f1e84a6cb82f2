"""MagnitudePruner passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_essential_sparsity import MagnitudePruner

test_conformance = conformance_tests(MagnitudePruner, {
    "": {}, "by layer": {"make": lambda: MagnitudePruner(0.3, scope="layer")},
    "2:4": {"make": lambda: MagnitudePruner(pattern="2:4")}, "4:8": {"make": lambda: MagnitudePruner(pattern="4:8")},
    "nearly all": {"make": lambda: MagnitudePruner(0.99)}})
