"""promptquine: evolve a shorter, better prompt by deleting tokens from an ordinary one."""

from looseleaf_promptquine.optimizer import PromptQuine
from looseleaf_promptquine.tapruning import TAPruning

__all__ = ["PromptQuine", "TAPruning"]
