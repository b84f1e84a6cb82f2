from __future__ import annotations

from looseleaf.testing import conformance_tests
from looseleaf_syntactic_domain import SyntacticDomainProbe

test_conformance = conformance_tests(SyntacticDomainProbe)
