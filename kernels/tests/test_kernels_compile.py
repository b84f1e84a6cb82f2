"""Ahead-of-time compilation without a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from looseleaf_kernels.compile import main


def test_unknown_target(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--target", "vulkan:1"])
    assert stop.value.code == 2
    assert "expected cuda:<capability> or hip:<gfx name>" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_one_target_fills_a_cache(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "looseleaf_kernels.compile", "--target", "cuda:90", "--out",
                           str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "attention_forward bf16 D128 block128 causal" in done.stdout
    assert "quantized_forward i8 D128 64x64 full" in done.stdout
    assert list(tmp_path.rglob("*.cubin"))
