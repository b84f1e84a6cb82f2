"""Word classes in the layers of a next-word predictor (arXiv 2302.07588)."""

from looseleaf_word_class.planted import Grammar, PlantedModel, example_texts
from looseleaf_word_class.probe import LayerResult, WordClassProbe
from looseleaf_word_class.representations import Representations, representations, untrained
from looseleaf_word_class.separation import Measured, PairGDV, Separation, conditional, gdv, gdv_reference, measure
from looseleaf_word_class.tags import brown_class, penn_class
from looseleaf_word_class.windows import Windows, labelled, tagged, windows
from looseleaf_word_class.word_model import WordModel, train_word_model

__all__ = ["Grammar", "LayerResult", "Measured", "PairGDV", "PlantedModel", "Representations", "Separation", "Windows",
           "WordClassProbe", "WordModel", "brown_class", "conditional", "example_texts", "gdv", "gdv_reference",
           "labelled", "measure", "penn_class", "representations", "tagged", "train_word_model", "untrained", "windows"]
