"""What a result belongs to: what is kept on disk must not be taken for that of another model or other data."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from looseleaf.offload import offloaded

if TYPE_CHECKING:
    import torch

SAMPLE = 1024
"""Elements of each tensor that are hashed one by one; all of them are in the sum of its bits."""


def fingerprint(model: torch.nn.Module | Mapping[str, torch.Tensor]) -> str:
    """16 hexadecimal digits that change when any name, shape, dtype or value of a module, or of tensors by name, does.

    Of each tensor the sum of all bit patterns (whole numbers, so neither threads nor device matter) and evenly spaced
    elements are hashed: as fast as reading the weights once, at the price that values which are only exchanged
    between places can go unseen.
    """
    import torch

    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    digest = hashlib.sha256()
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    elsewhere = {} if isinstance(model, Mapping) else offloaded(model)
    for name, tensor in (model if isinstance(model, Mapping) else model.state_dict()).items():
        if not isinstance(tensor, torch.Tensor):  # extra state of a module
            continue
        # a tensor read from disk is gone at the next turn, and its place may be another's
        moved = tensor.is_meta and name in elsewhere
        tensor = elsewhere[name]() if moved else tensor
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        place = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if tensor.is_meta or (not moved and tensor.numel() and place in seen):  # tied weights are read once
            digest.update(seen.get(place, "meta").encode())
            continue
        if not moved:
            seen[place] = name
        flat = tensor.detach().reshape(-1)
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1) if flat.is_complex() else flat
        bits = flat.view(whole[flat.element_size()])
        digest.update(str(int(bits.sum(dtype=torch.int64))).encode())
        digest.update(bits[::max(1, len(bits) // SAMPLE)].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def content_fingerprint(value: Any) -> str:
    """16 hexadecimal digits that stand for the whole content of a value.

    Numbers, text, paths, containers, dataclasses, tensors, arrays, PIL images, and objects with ``fingerprint()``,
    ``to_dict()`` or plain attributes; functions by their name.

    Raises:
        TypeError: an object that shows nothing of its content.
    """
    return _hashed(value, ())


def _hashed(value: Any, inside: tuple[int, ...]) -> str:
    """``inside``: the identities of what the value is part of, where a cycle ends."""
    kind, parts = ("cycle", ()) if id(value) in inside else _content_of(value)
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        content = part if isinstance(part, bytes) else _hashed(part, (*inside, id(value))).encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:16]


def _content_of(value: Any) -> tuple[str, Iterable[Any]]:
    """What a value is, and its content as bytes and further values."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if value is None or isinstance(value, (int, float, complex, str, os.PathLike)):
        return kind, [str(value).encode("utf-8", "surrogatepass")]
    if isinstance(value, (bytes, bytearray)):
        return "bytes", [bytes(value)]
    if isinstance(value, functools.partial):
        return "partial", [value.func, value.args, value.keywords]
    if hasattr(value, "__qualname__"):  # functions, methods and classes
        return "name", [str(value.__module__), value.__qualname__]
    own = getattr(value, "fingerprint", None) or getattr(value, "to_dict", None)
    if callable(own):
        return kind, [own()]
    if hasattr(value, "detach") and hasattr(value, "layout"):
        import torch

        flat = value.detach().cpu().to_dense().contiguous().reshape(-1)
        return f"tensor {value.dtype} {tuple(value.shape)}", [flat.view(torch.uint8).numpy().tobytes()]
    if hasattr(value, "__array_interface__") and hasattr(value, "dtype"):
        content = value.tolist() if value.dtype.hasobject else value.tobytes()
        return f"array {value.dtype.str} {value.shape}", [content]
    if hasattr(value, "tobytes") and hasattr(value, "mode"):
        return f"image {value.mode} {value.size}", [value.tobytes(), value.getpalette()]
    if dataclasses.is_dataclass(value):
        return kind, [{f.name: getattr(value, f.name) for f in dataclasses.fields(value)}]
    if isinstance(value, Mapping):
        entries = {content_fingerprint(k): v for k, v in value.items()}
        return "mapping", [part for key in sorted(entries) for part in (key, entries[key])]
    if isinstance(value, (set, frozenset)):
        return "set", sorted(map(content_fingerprint, value))
    if isinstance(value, Sequence):
        return "sequence", value
    if hasattr(value, "__dict__"):
        return kind, [vars(value)]
    raise TypeError(f"content_fingerprint: expected a value whose content can be read, got {kind}: give its class a "
                    "method fingerprint() -> str")


__all__ = ["content_fingerprint", "fingerprint"]
