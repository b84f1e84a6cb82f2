"""ICLRegressionProbe passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_icl_linear_regression import ICLRegressionProbe

test_conformance = conformance_tests(ICLRegressionProbe)
