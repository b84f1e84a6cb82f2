"""UnifiedSparsity passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_unified_sparsity import UnifiedSparsity

test_conformance = conformance_tests(UnifiedSparsity)
