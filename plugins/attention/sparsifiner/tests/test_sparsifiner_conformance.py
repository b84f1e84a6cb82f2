"""The conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_sparsifiner import Sparsifiner

test_conformance = conformance_tests(Sparsifiner)
