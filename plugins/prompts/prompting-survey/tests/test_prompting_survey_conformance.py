"""The optimisers pass the conformance kit."""

import importlib.util

import pytest

from looseleaf.testing import conformance_tests
from looseleaf_prompting_survey import SoftPromptTuning, TemplateEnsemble, TemplateSearch

test_template_ensemble = conformance_tests(TemplateEnsemble)
test_template_search = conformance_tests(TemplateSearch)
test_soft_prompt_tuning = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="PEFT is not installed")(conformance_tests(SoftPromptTuning))
