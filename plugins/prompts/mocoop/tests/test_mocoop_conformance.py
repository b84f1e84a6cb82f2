"""MoCoOp passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_mocoop import MoCoOp

test_mocoop = conformance_tests(MoCoOp)
