"""SparseD passes the conformance kit, which takes it through whole denoising runs."""

from looseleaf.testing import check_attention_backend
from looseleaf_sparsed import SparseD


def test_conformance() -> None:
    check_attention_backend(SparseD)
