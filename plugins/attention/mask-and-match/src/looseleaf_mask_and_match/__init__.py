"""Mask & Match: see where a reader of formulas looks, learned without labels (arXiv 2508.06107)."""

from looseleaf_mask_and_match.backend import MaskAndMatch, draw_map
from looseleaf_mask_and_match.contrast import ContrastivePretraining
from looseleaf_mask_and_match.latex import LatexVocabulary, latex_tokens, normalise
from looseleaf_mask_and_match.recognizer import FormulaRecognizer, stack

__all__ = ["ContrastivePretraining", "FormulaRecognizer", "LatexVocabulary", "MaskAndMatch", "draw_map",
           "latex_tokens", "normalise", "stack"]
