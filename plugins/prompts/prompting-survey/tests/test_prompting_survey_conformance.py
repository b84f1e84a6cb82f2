"""The optimisers pass the conformance kit."""

import pytest

from looseleaf.testing import check_prompt_optimizer
from looseleaf_prompting_survey import TemplateEnsemble, TemplateSearch


@pytest.mark.parametrize("cls", [TemplateEnsemble, TemplateSearch])
def test_prompting_survey_conformance(cls: type) -> None:
    check_prompt_optimizer(cls)
