"""InverseDynamics passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_inverse_dynamics import InverseDynamics

test_conformance = conformance_tests(InverseDynamics)
