"""prompting-survey: prompting as small parts that fit together, and a map of its methods as data."""

from looseleaf_prompting_survey.answers import (
    AnswerPrediction,
    PromptComposer,
    PromptDecomposer,
    answer,
    search,
    shared_prompts,
    spans,
)
from looseleaf_prompting_survey.augment import PromptAugmenter
from looseleaf_prompting_survey.ensemble import distil, fit_ensemble, generate_together
from looseleaf_prompting_survey.optimizers import TemplateEnsemble, TemplateSearch
from looseleaf_prompting_survey.templates import default_pool, mine_templates, paraphrase
from looseleaf_prompting_survey.training import STRATEGIES, SoftPromptTuning, Strategy, movable, tune
from looseleaf_prompting_survey.typology import typology

__all__ = ["STRATEGIES", "AnswerPrediction", "PromptAugmenter", "PromptComposer", "PromptDecomposer",
           "SoftPromptTuning", "Strategy", "TemplateEnsemble", "TemplateSearch", "answer", "default_pool", "distil",
           "fit_ensemble", "generate_together", "mine_templates", "movable", "paraphrase", "search", "shared_prompts",
           "spans", "tune", "typology"]
