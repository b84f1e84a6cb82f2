"""ImplicitReasoningProbe passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_implicit_reasoning import ImplicitReasoningProbe

test_conformance = conformance_tests(ImplicitReasoningProbe)
