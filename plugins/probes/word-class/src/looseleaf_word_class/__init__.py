"""Word classes in the layers of a next-word predictor (arXiv 2302.07588)."""

from looseleaf_word_class.separation import Measured, PairGDV, Separation, conditional, gdv, gdv_reference, measure

__all__ = ["Measured", "PairGDV", "Separation", "conditional", "gdv", "gdv_reference", "measure"]
