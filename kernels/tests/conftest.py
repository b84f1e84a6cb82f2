"""What the tests of all kernels share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest


@pytest.fixture
def agrees_under_the_interpreter() -> Callable[[str], None]:
    """Run a script that prints "agrees" under Triton's interpreter, which has to be asked for before Triton is
    imported; ``{tests!r}`` in it becomes the folder of the tests."""
    def run(script: str) -> None:
        done = subprocess.run([sys.executable, "-c", script.format(tests=os.path.dirname(__file__))],
                              env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.strip() == "agrees"

    return run
