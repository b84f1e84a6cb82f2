"""Errors that a user of Looseleaf can meet. Each message says what was expected, what was given and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class LooseleafError(Exception):
    """Base class of all errors raised on purpose by Looseleaf (bad values raise ``ValueError`` as usual)."""

    exit_code: ClassVar[int] = 2
    """Of the command line, see :mod:`looseleaf.cli.main`."""


class PluginError(LooseleafError):
    """A plugin cannot be found, loaded or trusted to run."""

    exit_code = 3


class UnknownPluginError(PluginError, KeyError):
    """No installed distribution offers a plugin of this name."""

    __str__ = Exception.__str__  # KeyError would show the repr


class BrokenPluginError(PluginError):
    """The plugin is installed but its import failed, or it was made for another major version of the core."""


class AmbiguousPluginError(PluginError):
    """Two distributions claim one name."""


class MissingPackageError(LooseleafError):
    """A command needs a package that is not installed."""

    exit_code = 4


class UnsupportedModelError(LooseleafError, TypeError):
    """The model has nothing that this method can act on."""


class BudgetExhausted(LooseleafError):
    """A call would go beyond the :class:`looseleaf.Budget`; raised before the work is done."""


class EndpointError(LooseleafError):
    """A language-model server could not be reached, refused the request, or cannot do what was asked."""

    exit_code = 5


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence naming near names, or the empty string."""
    names = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(n) for n in names)}?" if names else ""
