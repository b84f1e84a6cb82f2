"""PriorProbe passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_prior_distribution import PriorProbe

test_conformance = conformance_tests(PriorProbe)
