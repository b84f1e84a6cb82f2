"""MetadataProbe passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_metadata_conditioning import MetadataProbe

test_conformance = conformance_tests(MetadataProbe)
