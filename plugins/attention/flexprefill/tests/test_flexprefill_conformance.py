"""FlexPrefill passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_flexprefill import FlexPrefill

test_conformance = conformance_tests(FlexPrefill)
