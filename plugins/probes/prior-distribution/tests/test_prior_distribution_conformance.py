"""PriorProbe passes the conformance kit."""

from looseleaf.testing import check_probe
from looseleaf_prior_distribution import PriorProbe


def test_conformance() -> None:
    check_probe(PriorProbe, lambda: PriorProbe(tasks=("counting",), instances=5, demonstrations=1, scaled=3, layers=1))
