"""Which GPU jobs there are: one per visible device and per torch version asked for."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One job: a device index (None: no GPU), what the device is called, a torch version (None: the pinned one)."""

    device: int | None
    gpu: str
    torch: str | None

    @property
    def name(self) -> str:
        """The job's name in `nox -l`."""
        if self.device is None:
            return "no-gpu"
        label = "-".join(self.gpu.lower().split()) or "gpu"
        return f"{label}-{self.device}-torch-{self.torch or 'pinned'}"


def matrix(devices: list[str], versions: list[str]) -> list[Cell]:
    """All jobs for these device names and torch versions; one job without a device where there is none."""
    if not devices:
        return [Cell(None, "", None)]
    asked: list[str | None] = [v for v in versions if v] or [None]
    return [Cell(n, gpu, version) for n, gpu in enumerate(devices) for version in asked]


def visible_devices() -> list[str]:
    """Names of the GPUs that the driver's own tools list; the empty list where there are none."""
    commands = (["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
                ["rocm-smi", "--showproductname", "--csv"])
    for command in commands:
        try:
            out = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if out.returncode == 0:
            lines = [line.strip() for line in out.stdout.splitlines() if line.strip()]
            if command[0] == "rocm-smi":
                lines = [line.split(",")[1] for line in lines[1:] if "," in line]
            return lines
    return []


def cells() -> list[Cell]:
    """The jobs of this machine; LOOSELEAF_TORCH holds versions separated by spaces or commas."""
    return matrix(visible_devices(), os.environ.get("LOOSELEAF_TORCH", "").replace(",", " ").split())
