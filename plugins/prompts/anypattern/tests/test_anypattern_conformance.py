"""ImageStacker passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_anypattern import ImageStacker

test_conformance = conformance_tests(ImageStacker)
