"""relief: a policy that adds small vectors to chosen nodes of a graph, in front of a frozen graph network."""

from looseleaf_relief.baselines import GPF, SUPT, FineTuning, GPFPlus, LinearProbe, RandomPrompt
from looseleaf_relief.graphs import GraphNetwork, mean_auroc, neighbourhoods
from looseleaf_relief.optimizer import RELIEF
from looseleaf_relief.prompt import FeaturePrompt, GraphPredictor, coverage

__all__ = ["GPF", "RELIEF", "SUPT", "FeaturePrompt", "FineTuning", "GPFPlus", "GraphNetwork", "GraphPredictor",
           "LinearProbe", "RandomPrompt", "coverage", "mean_auroc", "neighbourhoods"]
