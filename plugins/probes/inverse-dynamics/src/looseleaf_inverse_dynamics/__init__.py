"""Inverse dynamics pre-training for multitask imitation (arXiv 2305.16985)."""

from looseleaf_inverse_dynamics.demonstrations import Demonstrations
from looseleaf_inverse_dynamics.linear import LinearWorld, double_integrator, linear_encoder
from looseleaf_inverse_dynamics.networks import PictureEncoder, VectorEncoder, spatial_softmax
from looseleaf_inverse_dynamics.objectives import (
    Cloning,
    Contrastive,
    ForwardExplicit,
    ForwardImplicit,
    Inverse,
    Objective,
    check_objective,
    info_nce,
)
from looseleaf_inverse_dynamics.probe import InverseDynamics
from looseleaf_inverse_dynamics.training import Policy, Pretrained, action_error, pretrain, rollout, transfer

__all__ = ["Cloning", "Contrastive", "Demonstrations", "ForwardExplicit", "ForwardImplicit", "Inverse",
           "InverseDynamics", "LinearWorld", "Objective", "PictureEncoder", "Policy", "Pretrained", "VectorEncoder",
           "action_error", "check_objective", "double_integrator", "info_nce", "linear_encoder", "pretrain", "rollout",
           "spatial_softmax", "transfer"]
