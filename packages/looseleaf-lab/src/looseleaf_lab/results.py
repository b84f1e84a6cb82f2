"""Finished pieces of a grid, one file each, so that a run that was stopped goes on with what is missing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from looseleaf.files import write_text
from looseleaf.resume import as_plain, digest

SCHEMA = "looseleaf.cell/1"


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
        if not isinstance(data, dict) or data.get("schema") != SCHEMA or digest(data["key"]) != digest(key):
            return None
        return data["result"]

    def put(self, key: Mapping[str, Any], result: Any) -> None:
        """Keep the result of a cell. Plain data only; NaN and infinities become null."""
        path = self.path(key)
        if path is not None:
            data = {"schema": SCHEMA, "key": as_plain(key), "result": as_plain(result)}
            write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")

    def do(self, key: Mapping[str, Any], function: Callable[[], Any]) -> Any:
        """The kept result, or that of ``function()``, which is then kept."""
        found = self.get(key)
        if found is None:
            # what is returned now and what a resumed run reads must not differ
            found = as_plain(function())
            self.put(key, found)
        return found


__all__ = ["ResultCache"]
