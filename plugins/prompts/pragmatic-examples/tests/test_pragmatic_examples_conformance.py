"""PragmaticExamples passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_pragmatic_examples import PragmaticExamples

test_conformance = conformance_tests(PragmaticExamples)
