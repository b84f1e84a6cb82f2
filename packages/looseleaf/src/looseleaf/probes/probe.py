"""The interface of a method that observes a model or intervenes in it."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from looseleaf.plugin import Plugin

if TYPE_CHECKING:
    from looseleaf.report import Report


@dataclasses.dataclass
class Probe(Plugin):
    """Observes, or intervenes, and always reports what it measured."""

    kind: ClassVar[str] = "probes"

    @abstractmethod
    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        """The measurement. The subject is left as it was found, also after an exception.

        Args:
            subject: as the probe documents it: a model, a ``(model, processor)`` pair, a pipeline of
                transformers, a ``looseleaf_text.LocalModel``, an environment. See
                :func:`looseleaf.probes.subject.parts`.
            data: as the probe documents it; None: the probe's built-in example data.
            seed: the only source of randomness.
            progress: show a progress bar; None: only on a terminal.
        """
