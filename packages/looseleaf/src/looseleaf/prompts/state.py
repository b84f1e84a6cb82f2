"""Search state on disk: written whole or not at all, and checked when read."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looseleaf.errors import LooseleafError
from looseleaf.files import write_text
from looseleaf.fingerprint import fingerprint

if TYPE_CHECKING:
    from looseleaf.prompts.model import LanguageModel
    from looseleaf.prompts.optimizer import PromptOptimizer
    from looseleaf.prompts.prompt import Prompt
    from looseleaf.prompts.task import Task

SCHEMA = "looseleaf.search/1"


class StateError(LooseleafError, ValueError):
    """The search state on disk is damaged or belongs to another search."""


def identity(optimizer: PromptOptimizer, task: Task, model: LanguageModel, start: Prompt | None,
             seed: int) -> dict[str, Any]:
    """What makes two searches the same one: method, parameters, examples, model, start and seed.

    The budget is not part of it: a search that ran out may be given more and goes on.
    """
    begin = None
    if start is not None:
        tensors: dict[str, Any] = {}
        begin = {k: v for k, v in start.to_dict(tensors).items() if k != "info"}
        begin["soft"] = fingerprint(tensors) if tensors else None
    return json.loads(json.dumps({
        "optimizer": f"{type(optimizer).__module__}:{type(optimizer).__qualname__}",
        "parameters": optimizer.parameters(), "task": task.fingerprint(), "model": model.name,
        "weights": model.fingerprint(), "start": begin, "seed": seed}, default=str))


class SearchState:
    """The state of one search in ``<state_dir>/state.json``.

    Args:
        state_dir: folder of this search alone, made when needed; None keeps nothing.
        identity: see :func:`identity`; a state with another identity is refused.
    """

    def __init__(self, state_dir: str | Path | None, identity: Mapping[str, Any]) -> None:
        self.path = None if state_dir is None else Path(state_dir) / "state.json"
        self.identity = dict(identity)

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
            payload, checksum, found = data["payload"], data["checksum"], data["identity"]
            schema = data["schema"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise StateError(f"the search state {self.path} cannot be read ({type(error).__name__}: {error}): "
                             f"{advice}") from error
        if schema != SCHEMA:
            raise StateError(f"the search state {self.path} has schema {schema!r}, allowed is {SCHEMA!r}: {advice}")
        if checksum != _checksum(payload):
            raise StateError(f"the search state {self.path} was changed or damaged after it was written: {advice}")
        other = sorted(k for k in {*found, *self.identity} if found.get(k) != self.identity.get(k))
        if other:
            said = "; ".join(f"{k} was {_short(found.get(k))}, is {_short(self.identity.get(k))}" for k in other)
            raise StateError(f"the search state {self.path} belongs to another search ({said}): {advice}")
        return payload

    def save(self, payload: Mapping[str, Any]) -> None:
        """Write ``payload`` (plain data) so that a kill at any moment leaves the former or the new state."""
        if self.path is None:
            return
        plain = json.loads(json.dumps(payload))
        write_text(self.path, json.dumps({"schema": SCHEMA, "identity": self.identity,
                                          "checksum": _checksum(plain), "payload": plain}))


def rng_state(rng: random.Random) -> list[Any]:
    """The state of a generator as plain data."""
    version, words, gauss = rng.getstate()
    return [version, list(words), gauss]


def restore_rng(rng: random.Random, state: list[Any]) -> None:
    """The inverse of :func:`rng_state`."""
    version, words, gauss = state
    rng.setstate((version, tuple(words), gauss))


def _checksum(payload: Any) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()[:16]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
