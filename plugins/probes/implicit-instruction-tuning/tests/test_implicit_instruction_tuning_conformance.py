"""ImplicitTuningProbe passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_implicit_instruction_tuning import ImplicitTuningProbe

test_conformance = conformance_tests(ImplicitTuningProbe)
