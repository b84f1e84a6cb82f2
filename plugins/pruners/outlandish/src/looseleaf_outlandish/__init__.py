"""How new data permeates a language model's knowledge, and how to dilute it (arXiv 2504.09522)."""

from looseleaf_outlandish.data import SAMPLES, Sample, read_samples
from looseleaf_outlandish.probe import (
    KeywordProbabilities,
    Outcome,
    PrimingProbe,
    keyword_probabilities,
    learn,
    log_memorisation,
    log_priming,
    restored,
)
from looseleaf_outlandish.pruner import Ignored, IgnoreTopK
from looseleaf_outlandish.stones import STEPPING_STONES, descriptions, stepping_stones

__version__ = "0.2.1"
__all__ = ["SAMPLES", "STEPPING_STONES", "IgnoreTopK", "Ignored", "KeywordProbabilities", "Outcome", "PrimingProbe",
           "Sample", "descriptions", "keyword_probabilities", "learn", "log_memorisation", "log_priming",
           "read_samples", "restored", "stepping_stones"]
