"""Checkpoints of Looseleaf's own small models: ``folder(name)`` is what ``from_pretrained`` takes.

Every folder has a ``card.json``: what the model is for and not for, the recipe's seed, data, minutes, and figures on
named splits. Results name such a model with the word "self-trained".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

CHECKPOINTS = Path(__file__).parent / "checkpoints"


def names() -> list[str]:
    """The models that are here, sorted."""
    return sorted(path.parent.name for path in CHECKPOINTS.glob("*/card.json"))


def folder(name: str) -> Path:
    """The folder of a model, for ``from_pretrained``.

    Raises:
        ValueError: there is no such model.
    """
    if name not in names():
        raise ValueError(f"model: expected one of {', '.join(names()) or 'none yet'}, got {name!r}")
    return CHECKPOINTS / name


def card(name: str) -> dict[str, Any]:
    """What a model is, how it was made, and what it can do.

    Raises:
        ValueError: there is no such model.
    """
    read: dict[str, Any] = json.loads((folder(name) / "card.json").read_text(encoding="utf-8"))
    return read


__all__ = ["CHECKPOINTS", "card", "folder", "names"]
