"""PromptQuine and TAPruning pass the conformance kit."""

import pytest

from looseleaf.testing import check_prompt_optimizer
from looseleaf_promptquine import PromptQuine, TAPruning


@pytest.mark.parametrize("cls", [PromptQuine, TAPruning])
def test_promptquine_conformance(cls: type) -> None:
    check_prompt_optimizer(cls)
