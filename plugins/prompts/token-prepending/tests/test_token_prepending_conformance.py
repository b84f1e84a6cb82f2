"""TokenPrepending passes the conformance kit."""

from looseleaf.testing import check_prompt_optimizer
from looseleaf_token_prepending import TokenPrepending


def test_token_prepending_conformance() -> None:
    check_prompt_optimizer(TokenPrepending)
