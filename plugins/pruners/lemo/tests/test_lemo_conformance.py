"""LeMo passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_lemo import LeMo

test_conformance = conformance_tests(LeMo)
