"""The conformance kit of probes."""

from looseleaf.testing import conformance_tests
from looseleaf_word_class import WordClassProbe

test_conformance = conformance_tests(WordClassProbe)
