"""Looseleaf: research papers as plugins for your own PyTorch models.

Names are loaded when first used, so that ``import looseleaf`` costs milliseconds and never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from looseleaf.lazy import lazy

__version__ = "0.3.1"

_HOME = {
    "AttentionBackend": "attention.call", "AttentionCall": "attention.call",
    "Geometry": "attention.call", "Attached": "attention.attached", "attach": "attention.attach",
    "register_attention": "attention.registered", "SlidingWindow": "attention.window", "unwrapped": "unwrap",
    "Pruner": "pruning.pruner", "WeightPruner": "pruning.pruner", "TokenPruner": "pruning.pruner",
    "UpdatePruner": "pruning.pruner", "Masks": "pruning.masks", "LearnedMasks": "pruning.learned",
    "Unstructured": "pruning.selection", "NM": "pruning.selection", "PerRow": "pruning.selection",
    "Threshold": "pruning.selection", "Structured": "pruning.selection", "Tied": "pruning.selection",
    "Selection": "pruning.selection", "prunable_parameters": "pruning.targets",
    "Task": "tasks", "Example": "tasks", "Evaluation": "tasks", "Predictor": "tasks", "SetMetric": "tasks",
    "ScoreMetric": "tasks", "Prompt": "prompts.prompt", "PromptOptimizer": "prompts.optimizer", "Budget": "budget",
    "costs": "budget",
    "Probe": "probes.probe", "capture": "probes.hooks", "intervene": "probes.hooks", "patch": "probes.hooks",
    "Plugin": "plugin", "Paper": "paper", "Claim": "report", "Report": "report", "Table": "report",
    "Figure": "report", "Series": "report", "TokenStrip": "report",
    "get": "discovery", "plugins": "discovery", "load": "discovery",
    "LooseleafError": "errors", "PluginError": "errors", "UnknownPluginError": "errors",
    "BrokenPluginError": "errors", "AmbiguousPluginError": "errors", "UnsupportedModelError": "errors",
    "BudgetExhausted": "errors", "EndpointError": "errors",
}

__all__ = ["__version__", *sorted(_HOME)]
_load = lazy(__name__, _HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        from looseleaf.moved import GUIDE, NAMES

        if name in NAMES:  # ImportError, because an import of the name would hide the text of an AttributeError
            raise ImportError(f"looseleaf.{name} was part of looseleaf 0.1: write {NAMES[name]} (see {GUIDE})")
    return _load(name)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from looseleaf.attention.attach import attach
    from looseleaf.attention.attached import Attached
    from looseleaf.attention.call import AttentionBackend, AttentionCall, Geometry
    from looseleaf.attention.registered import register_attention
    from looseleaf.attention.window import SlidingWindow
    from looseleaf.budget import Budget, costs
    from looseleaf.discovery import get, load, plugins
    from looseleaf.errors import (
        AmbiguousPluginError,
        BrokenPluginError,
        BudgetExhausted,
        EndpointError,
        LooseleafError,
        PluginError,
        UnknownPluginError,
        UnsupportedModelError,
    )
    from looseleaf.paper import Paper
    from looseleaf.plugin import Plugin
    from looseleaf.probes.hooks import capture, intervene, patch
    from looseleaf.probes.probe import Probe
    from looseleaf.prompts.optimizer import PromptOptimizer
    from looseleaf.prompts.prompt import Prompt
    from looseleaf.pruning.learned import LearnedMasks
    from looseleaf.pruning.masks import Masks
    from looseleaf.pruning.pruner import Pruner, TokenPruner, UpdatePruner, WeightPruner
    from looseleaf.pruning.selection import NM, PerRow, Selection, Structured, Threshold, Tied, Unstructured
    from looseleaf.pruning.targets import prunable_parameters
    from looseleaf.report import Claim, Figure, Report, Series, Table, TokenStrip
    from looseleaf.tasks import Evaluation, Example, Predictor, ScoreMetric, SetMetric, Task
    from looseleaf.unwrap import unwrapped
