"""ColorMAE passes the conformance kit."""

from looseleaf.testing import conformance_tests
from looseleaf_colormae import ColorMAE

test_conformance = conformance_tests(ColorMAE, {"": {}, "volume": {"make": lambda: ColorMAE(
    "red", bank=32, size=8, video="volume", official_batching=False)}})
