"""RMaskTuning passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_rmask_tuning import RMaskTuning

test_conformance = conformance_tests(RMaskTuning)
