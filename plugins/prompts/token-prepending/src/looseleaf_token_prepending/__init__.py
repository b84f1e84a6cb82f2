"""Token Prepending: sentence embeddings from decoder language models without training (arXiv 2412.11556)."""

from looseleaf_token_prepending.baselines import last_token, mean_pooling, prompt_eol
from looseleaf_token_prepending.encoder import SentenceEncoder, Settings
from looseleaf_token_prepending.optimizer import TokenPrepending
from looseleaf_token_prepending.quality import nearest_neighbour, pairs_task, similarity, spearman
from looseleaf_token_prepending.templates import TEMPLATES

__all__ = ["TEMPLATES", "SentenceEncoder", "Settings", "TokenPrepending", "last_token", "mean_pooling",
           "nearest_neighbour", "pairs_task", "prompt_eol", "similarity", "spearman"]
