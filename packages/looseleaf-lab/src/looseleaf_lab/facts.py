"""What comparisons say about themselves: versions, models, plugins, and what was left out."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import Any

from looseleaf.fingerprint import fingerprint
from looseleaf.report import Report


def facts(**known: Any) -> dict[str, Any]:
    """``known`` and the versions and the device that the figures depend on."""
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "device": device,
                "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["transformers"] = importlib.metadata.version("transformers")
    return {**known, **versions}


def model_name(model: Any) -> str:
    """Class and number of parameters of a torch module."""
    return f"{type(model).__name__}-{sum(p.numel() for p in model.parameters())}"


def model_facts(model: Any) -> dict[str, str]:
    """What makes a kept cell that of this model: class, size and a fingerprint of the weights."""
    return {"model": model_name(model), "weights": fingerprint(model)}


def identity(plugin: Any) -> dict[str, Any]:
    """Class and hyper-parameters of a plugin, as plain data."""
    values = plugin.hyperparameters() if hasattr(plugin, "hyperparameters") else {}
    return {"class": f"{type(plugin).__module__}.{type(plugin).__qualname__}",
            **{k: v if isinstance(v, (int, float, str, bool, type(None))) else repr(v) for k, v in values.items()}}


def reason(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def left_out(report: Report, failed: Mapping[str, str]) -> None:
    """Say which plugins could not be measured, and why; one that fails never stops the others."""
    if failed:
        table = next((t for t in report.tables if t.title == "Left out"), None)
        table = table or report.table("Left out", ["plugin", "reason"])
        table.rows += [[name, why] for name, why in failed.items()]


__all__ = ["facts", "identity", "left_out", "model_facts", "model_name", "reason"]
