"""What a prompt optimiser finds, of whatever kind."""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from typing import Any, TypeVar

from looseleaf.prompts import storage
from looseleaf.tasks import Predictor, content_fingerprint

P = TypeVar("P", bound="Prompt")


@dataclasses.dataclass
class Prompt(ABC):
    """A prompt: text, vectors, pixels, exemplars, or a rule that makes one for each example.

    Subclasses are dataclasses whose fields are what was found: text, numbers, tensors, arrays, pictures, examples,
    other prompts, and dataclasses registered by :func:`looseleaf.prompts.storage.storable`, alone or in lists, tuples
    and dictionaries. So every prompt is saved and loaded here.

    Attributes:
        info: metadata of the search, plain data; optimisers fill ``fitness``, ``evaluations`` and ``stopped``.
    """

    info: dict[str, Any] = dataclasses.field(default_factory=dict, kw_only=True)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        storage.storable(cls)

    @abstractmethod
    def on(self, model: Any) -> Predictor:
        """The prompt and ``model`` together.

        A prompt that is made anew for each example (retrieved exemplars, a policy) does so in ``predict``; whatever
        that asks of a model it asks of ``model``, so that it is metered with the rest.
        """

    def fingerprint(self) -> str:
        """A short hash of all fields but :attr:`info`."""
        return content_fingerprint([type(self), {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                                                 if f.name != "info"}])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the prompt as JSON; tensors and pictures go beside it as ``<stem>.safetensors``.

        Raises:
            ValueError: a field holds what cannot be saved; it is named.
        """
        storage.save(path, self)

    @classmethod
    def load(cls: type[P], path: str | os.PathLike[str]) -> P:
        """Read what :meth:`save` wrote: a prompt of this class or of one below it.

        Only classes of installed Looseleaf packages, and those defined in this process, are made.

        Raises:
            ValueError: the file is no prompt, is damaged, or is one of another class.
        """
        prompt = storage.load(path)
        if not isinstance(prompt, cls):
            raise ValueError(f"{path}: expected a {cls.__name__}, got a {type(prompt).__name__}")
        return prompt
