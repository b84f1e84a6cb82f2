"""``python packages/looseleaf-models/recipes NAME``: train a model and put it where the package ships it."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """Train one model."""
    sys.path.insert(0, str(HERE))
    known = sorted(path.stem.replace("_", "-") for path in HERE.glob("*.py") if not path.stem.startswith("_"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=known)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of training; default: the recipe's")
    parser.add_argument("--state", type=Path, help="folder in which a killed run leaves what it has reached")
    given = parser.parse_args()
    options = {"steps": given.steps} if given.steps else {}
    folder = HERE.parent / "src" / "looseleaf_models" / "checkpoints" / given.name
    importlib.import_module(given.name.replace("-", "_")).train(folder, seed=given.seed, state=given.state, **options)


if __name__ == "__main__":
    main()
