"""PromptQuine and TAPruning pass the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_promptquine import PromptQuine, TAPruning

test_promptquine = conformance_tests(PromptQuine)
test_tapruning = conformance_tests(TAPruning)
