"""LinEAS: end-to-end learning of activation steering with a distributional loss (arXiv 2503.10679)."""

from looseleaf_lineas import data
from looseleaf_lineas.baselines import difference_in_means, lin_act
from looseleaf_lineas.probe import LinEAS, squared_w2
from looseleaf_lineas.steering import Steering

__all__ = ["LinEAS", "Steering", "data", "difference_in_means", "lin_act", "squared_w2"]
