"""CInGS passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_cings import CInGS

test_conformance = conformance_tests(CInGS)
