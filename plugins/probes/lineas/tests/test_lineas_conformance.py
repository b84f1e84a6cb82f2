"""LinEAS passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_lineas import LinEAS

test_conformance = conformance_tests(LinEAS)
