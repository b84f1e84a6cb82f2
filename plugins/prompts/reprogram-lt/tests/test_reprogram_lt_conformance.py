"""The plugin passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_reprogram_lt import LinearHead, TransferCost, VisualReprogram

test_conformance = conformance_tests(VisualReprogram)
test_conformance_of_the_linear_head = conformance_tests(LinearHead)
test_conformance_of_the_probe = conformance_tests(TransferCost)
