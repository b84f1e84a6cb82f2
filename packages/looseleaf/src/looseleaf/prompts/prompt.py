"""What a prompt optimiser finds, of whatever kind; on disk JSON for people, safetensors for numbers, and no code."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import io
import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from looseleaf.discovery import plugins
from looseleaf.files import load_tensors, read_text, save_tensors, write_text
from looseleaf.fingerprint import content_fingerprint
from looseleaf.tasks import Example, Predictor

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "looseleaf.prompt/2"
_TYPE = "$type"
_storable: dict[str, type] = {}
C = TypeVar("C", bound=type)
P = TypeVar("P", bound="Prompt")


def storable(cls: C) -> C:
    """Let prompts hold instances of a dataclass and be saved with them; a decorator.

    Every field that the constructor takes is written, and loading calls the constructor. Subclasses of
    :class:`Prompt` need no decorator.
    """
    _storable[_name(cls)] = cls
    return cls


@dataclasses.dataclass
class Prompt(ABC):
    """A prompt: text, vectors, pixels, exemplars, or a rule that makes one for each example.

    Subclasses are dataclasses whose fields are what was found: text, numbers, tensors, arrays, PIL images, examples,
    other prompts, and :func:`storable` dataclasses, alone or in lists, tuples and dictionaries.

    Attributes:
        info: metadata of the search, plain data; optimisers fill ``fitness``, ``evaluations`` and ``stopped``.
    """

    info: dict[str, Any] = dataclasses.field(default_factory=dict, kw_only=True)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        storable(cls)

    @abstractmethod
    def on(self, model: Any) -> Predictor:
        """The prompt and ``model`` together.

        A prompt that is made anew for each example (retrieved exemplars, a policy) does so in ``predict``; whatever
        that asks of a model it asks of ``model``, so that it is metered with the rest.
        """

    def fingerprint(self) -> str:
        """A short hash of all fields but :attr:`info`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "info"}
        return content_fingerprint([type(self), fields])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the prompt as JSON; tensors and pictures go beside it as ``<stem>.safetensors``.

        Raises:
            ValueError: a field holds what cannot be saved; it is named.
        """
        target = Path(path)
        if target.suffix == ".safetensors":
            raise ValueError(f"{target}: expected a path such as prompt.json, got the name of the tensors beside it")
        tensors: dict[str, Tensor] = {}
        data: dict[str, Any] = {"format": FORMAT, "prompt": _encode(self, tensors, "prompt")}
        if tensors:
            beside = target.with_suffix(".safetensors")
            save_tensors(beside, tensors, format=FORMAT)
            data["tensors"] = {"file": beside.name, "content": content_fingerprint(tensors)}
        write_text(target, json.dumps(data, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls: type[P], path: str | os.PathLike[str]) -> P:
        """Read what :meth:`save` wrote: a prompt of this class or of one below it.

        Only classes of installed Looseleaf packages, and those defined in this process, are made.

        Raises:
            ValueError: the file is no prompt, is damaged, or is one of another class.
        """
        source, text = Path(path), read_text(path)
        tensors: dict[str, Tensor] = {}
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}: expected a prompt as JSON, got {error}") from error
        kind = data.get("format", data.get("schema")) if isinstance(data, dict) else type(data).__name__
        if kind != FORMAT:
            raise ValueError(f"{source}: expected a prompt of the format {FORMAT!r}, got {kind!r}: search again with "
                             "this version of Looseleaf, or load it with the one that wrote it")
        if data.get("tensors"):
            tensors, _ = load_tensors(source.with_name(data["tensors"]["file"]), format=FORMAT)
            if content_fingerprint(tensors) != data["tensors"]["content"]:
                raise ValueError(f"{source}: expected the tensors that were saved with it in "
                                 f"{data['tensors']['file']}, got others: keep the two files together")
        prompt = json.loads(text, object_hook=functools.partial(_decode, tensors))["prompt"]
        if not isinstance(prompt, cls):
            raise ValueError(f"{source}: expected a {cls.__name__}, got a {type(prompt).__name__}")
        return prompt


def _encode(value: Any, tensors: dict[str, Tensor], place: str) -> Any:
    """``value`` as JSON, what is no JSON as an object with a type; numbers in bulk go to ``tensors``."""
    def part(inner: Any, name: Any) -> Any:
        return _encode(inner, tensors, f"{place}.{name}")

    if value is None or isinstance(value, (int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, float):
        return {_TYPE: "float", "value": repr(value)}
    if isinstance(value, list):
        return [part(item, n) for n, item in enumerate(value)]
    if isinstance(value, tuple):
        return {_TYPE: "tuple", "items": _encode(list(value), tensors, place)}
    if isinstance(value, Mapping):
        if all(isinstance(k, str) for k in value) and _TYPE not in value:
            return {k: part(v, k) for k, v in value.items()}
        return {_TYPE: "dict", "items": [[part(k, "key"), part(v, k)] for k, v in value.items()]}
    if _storable.get(_name(type(value))) is type(value) and dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value) if f.init]
        return {_TYPE: _name(type(value)), **{name: part(getattr(value, name), name) for name in names}}
    kind, tensors[place] = _tensor(value, place)
    return {_TYPE: kind, "name": place}


def _tensor(value: Any, place: str) -> tuple[str, Tensor]:
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        return "tensor", value.detach().cpu()
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc":
        return "array", torch.from_numpy(np.array(value))
    if hasattr(value, "mode") and hasattr(value, "tobytes") and hasattr(value, "save"):
        written = io.BytesIO()
        value.save(written, "PNG")  # without loss, palettes and transparency included
        return "image", torch.frombuffer(bytearray(written.getvalue()), dtype=torch.uint8)
    raise ValueError(f"{place}: expected text, numbers, tensors, arrays, PIL images, examples, prompts or dataclasses "
                     f"registered by looseleaf.prompts.prompt.storable, got {_name(type(value))}")


def _decode(tensors: Mapping[str, Tensor], entry: dict[str, Any]) -> Any:
    """What one JSON object stands for, its values decoded already."""
    kind = entry.pop(_TYPE, None)
    if kind is None:
        return entry
    if kind == "float":
        return float(entry["value"])
    if kind in ("tuple", "dict"):
        return {"tuple": tuple, "dict": dict}[kind](entry["items"])
    if kind in ("tensor", "array"):
        return tensors[entry["name"]] if kind == "tensor" else tensors[entry["name"]].numpy()
    if kind == "image":
        from PIL import Image

        with Image.open(io.BytesIO(tensors[entry["name"]].numpy().tobytes())) as image:
            return image.copy()
    cls: Any = _find(kind)
    known = {f.name for f in dataclasses.fields(cls) if f.init}
    unknown = sorted(set(entry) - known)
    if unknown:
        raise ValueError(f"{kind}: expected the fields {sorted(known)}, got {unknown} too: it was saved by another "
                         "version of the package")
    return cls(**entry)


def _find(name: str) -> type:
    """The class of this name; imported only from the core's libraries, and from packages that offer a plugin."""
    module = name.partition(":")[0]
    package = module.partition(".")[0]
    try:
        if name not in _storable and package in {
                "looseleaf", "looseleaf_text", "looseleaf_vision", "looseleaf_tickets",
                *(re.split("[.:]", each.value)[0] for each in plugins())}:
            importlib.import_module(module)
        return _storable[name]
    except (ImportError, KeyError) as error:
        raise ValueError(f"expected a prompt of an installed Looseleaf package, got {name} ({error}): pip install the "
                         f"package {package.replace('_', '-')}, or import the module that defines it") from error


def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


storable(Example)
__all__ = ["Prompt", "storable"]
