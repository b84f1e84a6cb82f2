"""``looseleaf doctor``: what this machine has and what is chosen on it."""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import os
import platform
import sys
from typing import Any

from looseleaf import discovery
from looseleaf.files import cache_dir
from looseleaf.report import Report

PACKAGES = ("torch", "triton", "transformers", "diffusers", "safetensors", "ray", "looseleaf-lab", "looseleaf-kernels")


def doctor(arguments: argparse.Namespace) -> int:
    """Print the state of the installation."""
    report = examine()
    print(report.to_json() if arguments.json else report.to_text())
    return 0


def examine() -> Report:
    """The state of the installation as a report."""
    import torch

    report = Report("looseleaf doctor", facts={
        "looseleaf": discovery.core_version(), "python": platform.python_version(),
        "platform": platform.platform(), "cache": str(cache_dir()),
        "threads": torch.get_num_threads()})
    versions = report.table("Packages", ["package", "version"])
    for name in PACKAGES:
        try:
            versions.add(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            versions.add(name, None)
    devices = report.table("Devices", ["device", "name", "capability", "memory GiB"])
    devices.add("cpu", platform.processor() or platform.machine(), None, _memory_gib())
    for n in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(n)
        devices.add(f"cuda:{n}", about.name, f"{about.major}.{about.minor}", about.total_memory / 2**30)
    _kernels(report)
    state = report.table("Plugins", ["plugin", "kind", "version", "state"])
    found = discovery.check_imports(discovery.plugins(), say=lambda line: print(line, file=sys.stderr))
    for plugin in found:
        state.add(plugin.qualified, plugin.kind, plugin.version, plugin.broken or "ready")
    return report


def _kernels(report: Report) -> None:
    import torch

    try:
        import looseleaf_kernels as kernels
    except ImportError as error:
        report.facts["kernels"] = f"not usable: {error}"
        return
    forced = os.environ.get("LOOSELEAF_KERNELS")
    report.facts["kernels forced by LOOSELEAF_KERNELS"] = forced or "no"
    table = report.table("Kernels", ["operation", "device", "dtype", "implementation", "why"])
    names: list[Any] = ["block_sparse_attention", "quantized_block_sparse_attention", "block_mean",
                        "vertical_slash_attention", "last_query_scores", "top_mass", "block_importance"]
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for name in names:
        for device in devices:
            for dtype in (torch.float32, torch.bfloat16):
                chosen, why = kernels.implementation_for(name, torch.device(device), dtype, 64)
                table.add(name, device, str(dtype).removeprefix("torch."), chosen, why)


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return None
