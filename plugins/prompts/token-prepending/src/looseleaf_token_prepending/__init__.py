"""Token Prepending: sentence embeddings from decoder language models without training (arXiv 2412.11556)."""

from looseleaf_token_prepending.encoder import SentenceEncoder, Settings, last_token, mean_pooling, prompt_eol
from looseleaf_token_prepending.optimizer import EmbeddingPrompt, TokenPrepending
from looseleaf_token_prepending.quality import nearest_neighbour, neighbour_accuracy, pairs_task, similarity
from looseleaf_token_prepending.templates import TEMPLATES

__all__ = ["TEMPLATES", "EmbeddingPrompt", "SentenceEncoder", "Settings", "TokenPrepending", "last_token",
           "mean_pooling", "nearest_neighbour", "neighbour_accuracy", "pairs_task", "prompt_eol", "similarity"]
