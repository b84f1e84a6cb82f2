"""LinEAS passes the conformance kit."""

from looseleaf.testing import check_probe
from looseleaf_lineas import LinEAS


def test_conformance() -> None:
    check_probe(LinEAS, lambda: LinEAS(steps=3))
