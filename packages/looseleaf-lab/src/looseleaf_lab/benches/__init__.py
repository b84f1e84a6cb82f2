"""Plugins side by side, against the unmodified model and baselines.

A :class:`Bench` is what ``looseleaf compare`` runs: one interface of plugins on one kind of subject. Each of those here
has a function of its own for use from Python, which takes your model, plugins and tasks.
"""

from __future__ import annotations

from looseleaf_lab.benches.bench import Bench, compare
from looseleaf_lab.benches.denoising import Denoising, compare_denoising
from looseleaf_lab.benches.lotteries import Lotteries, compare_lotteries
from looseleaf_lab.benches.prefill import Prefill, compare_attention
from looseleaf_lab.benches.probes import Probes, compare_probes
from looseleaf_lab.benches.prompts import TextPrompts, compare_prompts
from looseleaf_lab.benches.pruned_weights import PrunedWeights, compare_pruners

__all__ = ["Bench", "Denoising", "Lotteries", "Prefill", "Probes", "PrunedWeights", "TextPrompts", "compare",
           "compare_attention", "compare_denoising", "compare_lotteries", "compare_probes", "compare_prompts",
           "compare_pruners"]
