"""prompting-survey: prompting as small parts that fit together, and a map of its methods as data."""

from looseleaf_prompting_survey.augment import PromptAugmenter
from looseleaf_prompting_survey.compose import PromptComposer, share
from looseleaf_prompting_survey.decompose import PromptDecomposer, spans
from looseleaf_prompting_survey.ensemble import PromptEnsemble
from looseleaf_prompting_survey.formalism import Answered, answer, search
from looseleaf_prompting_survey.pool import default_pool, mine, paraphrase
from looseleaf_prompting_survey.soft_tuning import SoftPromptTuning
from looseleaf_prompting_survey.strategies import STRATEGIES, Strategy, movable, tune
from looseleaf_prompting_survey.template_ensemble import TemplateEnsemble
from looseleaf_prompting_survey.template_search import TemplateSearch
from looseleaf_prompting_survey.typology import typology

__all__ = ["STRATEGIES", "Answered", "PromptAugmenter", "PromptComposer", "PromptDecomposer", "PromptEnsemble",
           "SoftPromptTuning", "Strategy", "TemplateEnsemble", "TemplateSearch", "answer", "default_pool", "mine",
           "movable", "paraphrase", "search", "share", "spans", "tune", "typology"]
