"""JigsawProbe passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_jigsaw_r1 import JigsawProbe

test_conformance = conformance_tests(JigsawProbe)
