"""Errors that a user of Looseleaf can meet. Each message says what was expected, what was given and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LooseleafError(Exception):
    """Base class of all errors raised on purpose by Looseleaf (bad values raise ``ValueError`` as usual)."""


class PluginError(LooseleafError):
    """A plugin cannot be found, loaded or trusted to run."""


class UnknownPluginError(PluginError, KeyError):
    """No installed distribution offers a plugin of this name."""

    def __str__(self) -> str:  # KeyError would show the repr
        return str(self.args[0]) if self.args else ""


class BrokenPluginError(PluginError):
    """The plugin is installed but its import failed, or it was made for another major version of the core."""


class AmbiguousPluginError(PluginError):
    """Two distributions claim one name."""


class UnsupportedModelError(LooseleafError, TypeError):
    """The model has nothing that this method can act on."""


class BudgetExhausted(LooseleafError):
    """A call would go beyond the :class:`looseleaf.Budget`; raised before the work is done."""


class EndpointError(LooseleafError):
    """A language-model server could not be reached, refused the request, or cannot do what was asked."""


def near(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The ``known`` names most like ``name``, best first."""
    return difflib.get_close_matches(name, list(known), n=limit, cutoff=0.5)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence naming near names, or the empty string."""
    names = near(name, known)
    return f" Did you mean {' or '.join(repr(n) for n in names)}?" if names else ""
