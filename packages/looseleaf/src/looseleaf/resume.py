"""Long work that resumes where it was stopped.

The state is written atomically and carries what it belongs to, so that a kill at any moment leaves the former or the
new one, and the state of one run is never taken for that of another.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from looseleaf.errors import LooseleafError
from looseleaf.files import write_text

SCHEMA = "looseleaf.search/2"


class StateError(LooseleafError, ValueError):
    """The state on disk is damaged or belongs to another run."""


class SearchState:
    """The state of one search in ``<state_dir>/state.json``.

    Args:
        state_dir: folder of this search alone, created when needed; None keeps nothing.
        identity: plain data that tell this search from others (method, parameters, data, model, seed); a state with
            another identity is rejected. What may change between the calls, such as a budget, is no part of it.
    """

    def __init__(self, state_dir: str | os.PathLike[str] | None, identity: Mapping[str, Any]) -> None:
        self.path = None if state_dir is None else Path(state_dir) / "state.json"
        self.identity = as_plain(identity)

    def load(self) -> dict[str, Any] | None:
        """What was saved last, or None when there is nothing yet.

        Raises:
            StateError: the file is damaged, or was written by another search.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            payload, checksum, identity, schema = (data[k] for k in ("payload", "checksum", "identity", "schema"))
        except (ValueError, KeyError, TypeError) as error:
            raise self._error(f" cannot be read ({type(error).__name__}: {error})") from error
        if schema != SCHEMA:
            raise self._error(f": expected the schema {SCHEMA!r}, got {schema!r}")
        if checksum != digest(payload):
            raise self._error(" was changed or damaged after it was written")
        if differences := compare(identity, self.identity):
            raise self._error(f" belongs to another search ({differences})")
        return payload

    def _error(self, problem: str) -> StateError:
        return StateError(f"the search state {self.path}{problem}: remove {self.path} to begin again, or give another "
                          "state_dir")

    def save(self, payload: Mapping[str, Any]) -> None:
        """Write ``payload`` (plain data)."""
        if self.path is not None:
            plain = json.loads(json.dumps(payload))
            write_text(self.path, json.dumps({"schema": SCHEMA, "identity": self.identity,
                                              "checksum": digest(plain), "payload": plain}))


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits that stand for plain data."""
    return hashlib.sha256(json.dumps(as_plain(value), sort_keys=True).encode()).hexdigest()[:16]


def as_plain(value: Any) -> Any:
    """``value`` as JSON has it: numbers, text, lists, dictionaries; NaN and infinities become None."""
    if isinstance(value, dict):
        return {str(k): as_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy and torch, without importing either
        return as_plain(value.tolist())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)


def compare(former: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which entries of two identities differ, in words; empty where none does."""
    return "; ".join(f"{k} was {former.get(k)!r:.80}, is {now.get(k)!r:.80}"
                     for k in sorted({*former, *now}) if former.get(k) != now.get(k))


__all__ = ["SearchState", "StateError", "as_plain", "compare", "digest"]
