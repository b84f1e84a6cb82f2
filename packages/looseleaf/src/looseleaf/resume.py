"""Long work that resumes where it was stopped: the state of a search, and finished cells of a grid.

Everything is written atomically and carries what it belongs to, so that a kill at any moment leaves the former or the
new state, and the state of one run is never taken for that of another.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from looseleaf.errors import LooseleafError
from looseleaf.files import write_text

SEARCH, CELL = "looseleaf.search/2", "looseleaf.cell/1"


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
        advice = f"remove {self.path} to begin again, or give another state_dir"
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            payload, checksum, found, schema = (data[k] for k in ("payload", "checksum", "identity", "schema"))
        except (ValueError, KeyError, TypeError) as error:
            raise StateError(f"the search state {self.path} cannot be read ({type(error).__name__}: {error}): "
                             f"{advice}") from error
        if schema != SEARCH:
            raise StateError(f"the search state {self.path}: expected the schema {SEARCH!r}, got {schema!r}: {advice}")
        if checksum != digest(payload):
            raise StateError(f"the search state {self.path} was changed or damaged after it was written: {advice}")
        differences = compare(found, self.identity)
        if differences:
            raise StateError(f"the search state {self.path} belongs to another search ({differences}): {advice}")
        return payload

    def save(self, payload: Mapping[str, Any]) -> None:
        """Write ``payload`` (plain data)."""
        if self.path is not None:
            plain = json.loads(json.dumps(payload))
            write_text(self.path, json.dumps({"schema": SEARCH, "identity": self.identity,
                                              "checksum": digest(plain), "payload": plain}))


class ResultCache:
    """A folder with one JSON file for each finished piece of work; without a folder nothing is kept.

    Args:
        folder: where; made when the first cell is written. None: keep nothing.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def path(self, key: Mapping[str, Any]) -> Path | None:
        """The file of a cell: its first words for people, a hash of the whole key for certainty."""
        if self.folder is None:
            return None
        words = "-".join(str(v) for v in key.values() if isinstance(v, (str, int, float)))
        name = re.sub(r"[^A-Za-z0-9._=]+", "-", words).strip("-.")[:60]
        return self.folder / f"{name}-{digest(key)}.json"

    def get(self, key: Mapping[str, Any]) -> Any:
        """The result of a finished cell, or None.

        A file that cannot be read (a disk that ran full, an edit by hand) counts as not finished.
        """
        path = self.path(key)
        if path is None or not path.is_file():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(data, dict) or data.get("schema") != CELL or digest(data["key"]) != digest(key):
            return None
        return data["result"]

    def put(self, key: Mapping[str, Any], result: Any) -> None:
        """Keep the result of a cell. Plain data only; NaN and infinities become null."""
        path = self.path(key)
        if path is not None:
            data = {"schema": CELL, "key": as_plain(key), "result": as_plain(result)}
            write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")

    def do(self, key: Mapping[str, Any], function: Callable[[], Any]) -> Any:
        """The kept result, or that of ``function()``, which is then kept."""
        found = self.get(key)
        if found is None:
            # what is returned now and what a resumed run reads must not differ
            found = as_plain(function())
            self.put(key, found)
        return found


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits that stand for plain data."""
    return hashlib.sha256(json.dumps(as_plain(value), sort_keys=True).encode()).hexdigest()[:16]


def as_plain(value: Any) -> Any:
    """``value`` as JSON has it: numbers, text, lists, dictionaries; NaN and infinities become None."""
    from looseleaf.report import plain

    return json.loads(json.dumps(plain(value)))


def compare(former: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which entries of two identities differ, in words; empty where none does."""
    other = sorted(k for k in {*former, *now} if former.get(k) != now.get(k))
    return "; ".join(f"{k} was {_short(former.get(k))}, is {_short(now.get(k))}" for k in other)


def rng_state(rng: random.Random) -> list[Any]:
    """The state of a generator as plain data."""
    version, words, gauss = rng.getstate()
    return [version, list(words), gauss]


def restore_rng(rng: random.Random, state: list[Any]) -> None:
    """Give a generator the state that :func:`rng_state` read."""
    version, words, gauss = state
    rng.setstate((version, tuple(words), gauss))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


__all__ = ["ResultCache", "SearchState", "StateError", "as_plain", "compare", "digest", "restore_rng", "rng_state"]
