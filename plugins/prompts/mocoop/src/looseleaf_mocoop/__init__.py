"""mocoop: one soft prompt per group of hand templates, and a router that mixes the best for each picture."""

from looseleaf_mocoop.mixture import MixedText, MixtureSpec, Router, gate_loss, gate_target, text_loss
from looseleaf_mocoop.optimizer import MixturePredictor, MixturePrompt, MoCoOp, Share
from looseleaf_mocoop.templates import GENERAL, IMAGENET, group_templates

__all__ = ["GENERAL", "IMAGENET", "MixedText", "MixturePredictor", "MixturePrompt", "MixtureSpec", "MoCoOp", "Router",
           "Share", "gate_loss", "gate_target", "group_templates", "text_loss"]
