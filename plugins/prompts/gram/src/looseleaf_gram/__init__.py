"""gram: a start for prompt tuning and a function that bends its gradients, learned from pictures with captions."""

from looseleaf_gram.episodes import Cluster, Episode, Episodes, overlap
from looseleaf_gram.optimizer import Gram, MetaPrompt, meta_loss
from looseleaf_gram.regulator import Regulator, regulated

__all__ = ["Cluster", "Episode", "Episodes", "Gram", "MetaPrompt", "Regulator", "meta_loss", "overlap", "regulated"]
