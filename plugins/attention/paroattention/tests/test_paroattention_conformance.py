"""PAROAttention passes the conformance kit, which takes it through whole denoising runs."""

from looseleaf.testing import conformance_tests
from looseleaf_paroattention import PAROAttention

test_conformance = conformance_tests(PAROAttention)
