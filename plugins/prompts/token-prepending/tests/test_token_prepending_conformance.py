"""Token Prepending passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_token_prepending import TokenPrepending

test_conformance = conformance_tests(TokenPrepending)
