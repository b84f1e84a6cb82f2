"""The prior passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_mask_and_match import MaskAndMatch

test_conformance = conformance_tests(MaskAndMatch)
