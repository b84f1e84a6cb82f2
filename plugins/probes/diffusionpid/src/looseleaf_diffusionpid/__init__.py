"""DiffusionPID: interpreting diffusion via partial information decomposition (arXiv 2406.05191)."""

from looseleaf_diffusionpid.baselines import attention_maps
from looseleaf_diffusionpid.denoisers import PipelineDenoiser
from looseleaf_diffusionpid.information import (
    Denoiser,
    Mixture,
    Observation,
    Parts,
    decompose,
    known_case,
    logistic_samples,
    observe,
    with_errors,
)
from looseleaf_diffusionpid.probe import DiffusionPID, Explanation

__all__ = ["Denoiser", "DiffusionPID", "Explanation", "Mixture", "Observation", "Parts", "PipelineDenoiser",
           "attention_maps", "decompose", "known_case", "logistic_samples", "observe", "with_errors"]
