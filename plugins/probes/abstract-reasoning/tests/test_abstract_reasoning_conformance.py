"""The probe passes the conformance kit."""

from looseleaf.testing import check_probe
from looseleaf_abstract_reasoning import AbstractReasoningProbe


def test_conformance() -> None:
    check_probe(AbstractReasoningProbe, lambda: AbstractReasoningProbe(shots=4, per_category=2))
