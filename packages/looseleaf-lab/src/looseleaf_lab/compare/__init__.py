"""Plugins side by side, and against the unmodified model and trivial rivals."""

from __future__ import annotations

from looseleaf_lab.compare.attention import compare_attention
from looseleaf_lab.compare.denoising import compare_denoising
from looseleaf_lab.compare.probes import compare_probes
from looseleaf_lab.compare.prompts import compare_prompts
from looseleaf_lab.compare.pruners import compare_pruners

__all__ = ["compare_attention", "compare_denoising", "compare_probes", "compare_prompts", "compare_pruners"]
