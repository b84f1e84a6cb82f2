"""LayoutPrompter passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_layoutprompter import LayoutPrompter

test_layoutprompter = conformance_tests(LayoutPrompter)
