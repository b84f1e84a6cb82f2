"""implicit-reasoning: silent reasoning as parts to try, probes with controls, and a map of its methods as data."""

from looseleaf_implicit_reasoning.controls import PlantedTwoHop, planted
from looseleaf_implicit_reasoning.data import Problem, ReasoningData, TwoHop, chain, facts
from looseleaf_implicit_reasoning.decoding import SoftThinking, SoftThought
from looseleaf_implicit_reasoning.loops import LoopedLM, loop_layers
from looseleaf_implicit_reasoning.order import PremiseOrder
from looseleaf_implicit_reasoning.probe import ImplicitReasoningProbe
from looseleaf_implicit_reasoning.recall import BridgeRecall, consistency
from looseleaf_implicit_reasoning.states import ChainOfEmbedding, LinearJump, StepProbe, chain_of_embedding
from looseleaf_implicit_reasoning.taxonomy import taxonomy
from looseleaf_implicit_reasoning.training import (
    ContinuousThought,
    DynamicPauses,
    Encoded,
    Internalize,
    Pauses,
    encode,
)

__all__ = ["BridgeRecall", "ChainOfEmbedding", "ContinuousThought", "DynamicPauses", "Encoded",
           "ImplicitReasoningProbe", "Internalize", "LinearJump", "LoopedLM", "Pauses", "PlantedTwoHop", "PremiseOrder",
           "Problem", "ReasoningData", "SoftThinking", "SoftThought", "StepProbe", "TwoHop", "chain",
           "chain_of_embedding", "consistency", "encode", "facts", "loop_layers", "planted", "taxonomy"]
