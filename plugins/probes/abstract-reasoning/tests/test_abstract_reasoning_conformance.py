"""The probe passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_abstract_reasoning import AbstractReasoningProbe

test_conformance = conformance_tests(AbstractReasoningProbe)
