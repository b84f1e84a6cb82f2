"""The gate passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_theme_transformer import ThemeGate

test_conformance = conformance_tests(ThemeGate)
