"""LinEAS: end-to-end learning of activation steering with a distributional loss (arXiv 2503.10679)."""

from looseleaf_lineas import examples
from looseleaf_lineas.baselines import difference_in_means, lin_act
from looseleaf_lineas.probe import LinEAS
from looseleaf_lineas.steering import Steering
from looseleaf_lineas.wasserstein import squared_w2

__all__ = ["LinEAS", "Steering", "difference_in_means", "examples", "lin_act", "squared_w2"]
