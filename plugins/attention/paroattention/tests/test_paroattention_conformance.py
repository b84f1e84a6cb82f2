"""PAROAttention passes the conformance kit, which takes it through whole denoising runs."""

from looseleaf.testing import check_attention_backend
from looseleaf_paroattention import PAROAttention


def test_conformance() -> None:
    check_attention_backend(PAROAttention)
