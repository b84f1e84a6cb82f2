"""Names of looseleaf 0.1, and what to write now."""

from __future__ import annotations

GUIDE = "docs/how-to/from-0.1.md"

_HOMES = {
    "looseleaf_text": "LanguageModel LocalModel EndpointModel MaskedModel Template Verbalizer calibrate LogitLens "
                      "decoder_layers scale_layers",
    "looseleaf_tickets": "IterativePruner find_tickets Ticket TrainingRun train_ticket"}
NAMES = {name: f"from {home} import {name} (pip install {home.replace('_', '-')})"
         for home, names in _HOMES.items() for name in names.split()}
"""Names of the core in 0.1 -> the import of today."""

MODULES = {
    "looseleaf.prompts.budget": "looseleaf.budget", "looseleaf.prompts.state": "looseleaf.resume",
    "looseleaf.prompts.task": "looseleaf.tasks, or looseleaf_text for tasks of text",
    "looseleaf.probes.layers": "looseleaf_text", "looseleaf.probes.lens": "looseleaf_text",
    "looseleaf.probes.scaling": "looseleaf.probes.hooks and looseleaf_text",
    "looseleaf.pruning.iterative": "looseleaf_tickets", "looseleaf.pruning.tickets": "looseleaf_tickets",
    "looseleaf.pruning.training": "looseleaf_tickets", "looseleaf.testing.servers": "looseleaf_text.testing.servers",
    **{f"looseleaf.prompts.{name}": "looseleaf_text" for name in (
        "answers", "calibration", "endpoint", "local", "masked", "model", "prompt", "soft", "template", "verbalizer")}}
"""Modules of 0.1 -> where their names are today."""

ATTRIBUTES = {
    "changes": 'AttentionBackend.phases says it: phases = frozenset({"bidirectional"}) for changes = "encode"',
    "removes": "subclass WeightPruner, TokenPruner or UpdatePruner instead of Pruner",
    "improves": "the task's metric says it: leave the attribute out",
    "kit": "call it conformance",
    "parameters": "call it hyperparameters",
}
"""Class attributes and methods of plugins in 0.1 -> what takes their place."""


def advice(error: BaseException) -> str:
    """What to change where an import failed for a name or module of 0.1; empty for other errors."""
    if isinstance(error, ModuleNotFoundError) and error.name in MODULES:
        return f"{error.name} was part of looseleaf 0.1: its names are in {MODULES[error.name]} now (see {GUIDE})"
    for name in ("check_attention_backend", "check_pruner", "check_prompt_optimizer", "check_probe"):
        if isinstance(error, ImportError) and name in str(error):
            return f"looseleaf.testing.{name} was part of looseleaf 0.1: write conformance_tests (see {GUIDE})"
    return ""


def refuse_former(cls: type) -> None:
    """TypeError where a plugin class has an attribute of 0.1; the message says what to write now."""
    if cls.__module__.startswith("looseleaf."):
        return
    for name in ATTRIBUTES.keys() & vars(cls).keys():
        raise TypeError(f"{cls.__name__}.{name} was part of looseleaf 0.1: {ATTRIBUTES[name]} (see {GUIDE})")
    code = getattr(vars(cls).get("run"), "__code__", None)
    if getattr(cls, "kind", "") == "probes" and code is not None \
            and "tokenizer" in code.co_varnames[:code.co_argcount + code.co_kwonlyargcount]:
        raise TypeError(f"{cls.__name__}.run(model, data, tokenizer=...) was part of looseleaf 0.1: write run(subject, "
                        f"data=None, *, seed=0, progress=None), where subject may be (model, tokenizer) (see {GUIDE})")


__all__ = ["ATTRIBUTES", "GUIDE", "MODULES", "NAMES", "advice", "refuse_former"]
