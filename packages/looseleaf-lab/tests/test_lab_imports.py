"""Nothing heavy is imported before it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

MODULES = ["models", "data", "metrics", "timing", "html", "sweep", "study", "facts"]


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_light(module: str) -> None:
    code = (f"import sys, looseleaf_lab.{module}\n"
            "heavy = {'torch', 'transformers', 'ray', 'scipy', 'sklearn', 'matplotlib', 'yaml'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_data_files_are_in_the_package() -> None:
    from importlib import resources

    files = resources.files("looseleaf_lab")
    assert all(files.joinpath(name).is_file() for name in ("report.css", "report.js", "py.typed"))
