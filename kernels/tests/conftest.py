"""What the tests of all kernels share."""

from __future__ import annotations

import importlib.util
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


CASES_OF_A_MODULE = """
import sys
sys.path.insert(0, {{tests!r}})
import {module} as t
for case in t.CASES:
    t.check("triton", case)
print("agrees")
"""


@pytest.fixture
def cases_agree_under_the_interpreter(request: pytest.FixtureRequest,
                                      agrees_under_the_interpreter: Callable[[str], None]) -> Callable[[], None]:
    """Run ``check("triton", case)`` for each of the ``CASES`` of the test's module under Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    return lambda: agrees_under_the_interpreter(CASES_OF_A_MODULE.format(module=request.path.stem))
