"""The conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_diffusionpid import DiffusionPID

test_conformance = conformance_tests(DiffusionPID)
