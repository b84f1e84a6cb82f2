"""ease: choose the demonstrations of a prompt, their order and its instruction with a neural bandit."""

from looseleaf_ease.bandit import NeuralUCB
from looseleaf_ease.optimizer import EASE
from looseleaf_ease.search import ENCODERS
from looseleaf_ease.transport import earth_movers_distance
from looseleaf_text.encoders import Encoder

sentence_encoder = ENCODERS.named

__all__ = ["EASE", "Encoder", "NeuralUCB", "earth_movers_distance", "sentence_encoder"]
