"""SAICL passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_sa_icl import SAICL

test_conformance = conformance_tests(SAICL)
