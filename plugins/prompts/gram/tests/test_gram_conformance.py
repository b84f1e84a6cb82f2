"""Gram passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_gram import Gram

test_conformance = conformance_tests(Gram)
