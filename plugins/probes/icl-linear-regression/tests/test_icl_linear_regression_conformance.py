"""ICLRegressionProbe passes the conformance kit."""

from looseleaf.testing import check_probe
from looseleaf_icl_linear_regression import ICLRegressionProbe


def test_conformance() -> None:
    check_probe(ICLRegressionProbe, lambda: ICLRegressionProbe(steps=24, batch=8))
