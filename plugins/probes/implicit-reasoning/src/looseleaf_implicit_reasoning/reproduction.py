"""The survey's claims: small models from scratch, a planted model, and SmolLM2."""

from __future__ import annotations

from looseleaf_implicit_reasoning.probe import control_claim
from looseleaf_lab.study import Study

study = Study("Implicit reasoning: the planted model", None, lambda results: [control_claim()])
