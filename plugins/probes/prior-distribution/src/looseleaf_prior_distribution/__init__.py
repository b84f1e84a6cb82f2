"""The influence of the prior distribution in language models (arXiv 2504.12585)."""

from looseleaf_prior_distribution.answers import Behaviour, answer_scores, behaviour, lens_scores, priors
from looseleaf_prior_distribution.localisation import layer_prior_correlation, locate, observe, scaling
from looseleaf_prior_distribution.probe import PriorProbe
from looseleaf_prior_distribution.tasks import (
           Instance,
           PriorTask,
           acronym,
           counting,
           middle_word,
           reversal,
           shift_cipher,
           split_by_answer,
)
from looseleaf_prior_distribution.tuning import Tuned, mitigate

__all__ = ["Behaviour", "Instance", "PriorProbe", "PriorTask", "Tuned", "acronym", "answer_scores", "behaviour",
           "counting", "layer_prior_correlation", "lens_scores", "locate", "middle_word", "mitigate", "observe",
           "priors", "reversal", "scaling", "shift_cipher", "split_by_answer"]
