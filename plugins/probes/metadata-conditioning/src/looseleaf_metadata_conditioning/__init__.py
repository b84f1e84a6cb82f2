"""When metadata conditioning works for language model pre-training (arXiv 2504.17562)."""

from looseleaf_metadata_conditioning.collator import MetadataCollator, add_metadata_tokens, token_name
from looseleaf_metadata_conditioning.grammar import Document, LevelledPCFG, Scan, enumerate_texts, inside
from looseleaf_metadata_conditioning.probe import Documents, MetadataProbe
from looseleaf_metadata_conditioning.training import (
    excess_loss,
    grammar_collator,
    grammar_rows,
    small_llama,
    train,
    vocabulary_size,
)

__all__ = ["Document", "Documents", "LevelledPCFG", "MetadataCollator", "MetadataProbe", "Scan", "add_metadata_tokens",
           "enumerate_texts", "excess_loss", "grammar_collator", "grammar_rows", "inside", "small_llama", "token_name",
           "train", "vocabulary_size"]
