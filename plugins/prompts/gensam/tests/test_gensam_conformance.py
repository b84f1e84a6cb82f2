"""The conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_gensam import GenSAM

test_conformance = conformance_tests(GenSAM)
