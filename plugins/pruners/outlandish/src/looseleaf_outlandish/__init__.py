"""How new data permeates a language model's knowledge, and how to dilute it (arXiv 2504.09522)."""

from looseleaf_outlandish.learning import learn, restored
from looseleaf_outlandish.probe import Outcome, PrimingProbe
from looseleaf_outlandish.pruner import Ignored, IgnoreTopK
from looseleaf_outlandish.sample import Sample, read_samples
from looseleaf_outlandish.scores import Chances, chances, log_memorisation, log_priming
from looseleaf_outlandish.stones import STONES, descriptions, stepping_stones
from looseleaf_outlandish.texts import SAMPLES

__version__ = "0.1.0"
__all__ = ["SAMPLES", "STONES", "Chances", "IgnoreTopK", "Ignored", "Outcome", "PrimingProbe", "Sample", "chances",
           "descriptions", "learn", "log_memorisation", "log_priming", "read_samples", "restored", "stepping_stones"]
