"""Theme Transformer: a melody in, a piece out in which it returns, varied (arXiv 2111.04093)."""

from looseleaf_theme_transformer.backend import ThemeGate, follow
from looseleaf_theme_transformer.baselines import PromptTransformer, SequentialTransformer
from looseleaf_theme_transformer.model import ThemeTransformer, ThemeTransformerConfig
from looseleaf_theme_transformer.music import Note, Piece, piano_roll, read_midi, wav, write_midi, write_page
from looseleaf_theme_transformer.retrieval import ThemeRetriever
from looseleaf_theme_transformer.tokens import ThemeTokenizer
from looseleaf_theme_transformer.training import ThemeCollator, paper_optimizer, training_rows

__all__ = ["Note", "Piece", "PromptTransformer", "SequentialTransformer", "ThemeCollator", "ThemeGate",
           "ThemeRetriever", "ThemeTokenizer", "ThemeTransformer", "ThemeTransformerConfig", "follow",
           "paper_optimizer", "piano_roll", "read_midi", "training_rows", "wav", "write_midi", "write_page"]
