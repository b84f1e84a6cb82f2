"""The jobs of the GPU session, for made-up devices."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import gpu_matrix


def test_one_job_per_device_and_version() -> None:
    cells = gpu_matrix.matrix(["NVIDIA H200", "NVIDIA A100"], ["2.6.0", "2.13.0"])
    assert [(c.device, c.torch) for c in cells] == [(0, "2.6.0"), (0, "2.13.0"), (1, "2.6.0"), (1, "2.13.0")]
    assert len({c.name for c in cells}) == 4 and cells[0].name == "nvidia-h200-0-torch-2.6.0"


def test_no_version_asked_for_is_the_pinned_one() -> None:
    assert [c.name for c in gpu_matrix.matrix(["AMD Instinct MI300X"], [""])] == [
        "amd-instinct-mi300x-0-torch-pinned"]


def test_no_gpu_is_one_job_without_a_device() -> None:
    cells = gpu_matrix.matrix([], ["2.6.0"])
    assert [(c.device, c.name) for c in cells] == [(None, "no-gpu")]
