"""RELIEF passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_relief import RELIEF

test_relief = conformance_tests(RELIEF)
