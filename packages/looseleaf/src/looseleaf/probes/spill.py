"""What :func:`looseleaf.capture` kept: in memory up to a limit, beyond it in safetensors files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

Place = tuple[Path, str, torch.device]
"""File, key in it, and the device the tensor was on."""


class Kept(Sequence[Tensor]):
    """The outputs of one module, a tensor for each call; those on disk are read when they are asked for."""

    def __init__(self) -> None:
        self._items: list[Tensor | Place] = []

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [_read(item) for item in self._items[index]]
        return _read(self._items[index])

    def __iter__(self) -> Iterator[Tensor]:
        return map(_read, self._items)


class Store:
    """Tensors by module name and call; held in memory until they are more than ``max_bytes``, then written.

    Args:
        names: of the modules.
        max_bytes: what memory may hold.
        folder: where files go; it must exist, and hold none of an earlier capture. None: a temporary folder, made with
            the first file and gone with :meth:`close`.
    """

    def __init__(self, names: Sequence[str], max_bytes: int, folder: str | os.PathLike[str] | None) -> None:
        self.kept: dict[str, Kept] = {name: Kept() for name in names}
        self._max_bytes = max_bytes
        self._held = 0
        self._files = 0
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None:
            if not self._folder.is_dir():
                raise ValueError(f"spill={str(folder)!r}: allowed is True, or a folder that exists")
            if next(self._folder.glob("capture-*.safetensors"), None) is not None:
                raise ValueError(f"spill={str(folder)!r} holds an earlier capture (capture-*.safetensors): name an "
                                 "empty folder, or remove those files")

    def add(self, name: str, value: Tensor) -> None:
        """Keep one more output; what memory holds is written first where this one would be too much."""
        size = value.numel() * value.element_size()
        if self._held and self._held + size > self._max_bytes:
            self._write()
        self.kept[name]._items.append(value)
        self._held += size
        if self._held > self._max_bytes:
            self._write()

    def close(self) -> None:
        """Remove the files if their folder is a temporary one."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def _write(self) -> None:
        from safetensors.torch import save_file

        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="looseleaf-capture-")
            self._folder = Path(self._temporary.name)
        path = self._folder / f"capture-{self._files:06d}.safetensors"
        held: list[tuple[list[Any], int, str, Tensor]] = [
            (kept._items, call, f"{name}/{call}", item) for name, kept in self.kept.items()
            for call, item in enumerate(kept._items) if isinstance(item, Tensor)]
        try:
            save_file({key: item.contiguous() for _, _, key, item in held}, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        for items, call, key, item in held:
            items[call] = (path, key, item.device)
        self._files += 1
        self._held = 0


def _read(item: Tensor | Place) -> Tensor:
    if isinstance(item, Tensor):
        return item
    from safetensors import safe_open

    path, key, device = item
    if not path.exists():
        raise FileNotFoundError(f"{path} with {key} is gone: a capture that spills to a temporary folder can be read "
                                "inside its with-block; pass spill='folder' to keep the files")
    with safe_open(path, "pt") as file:
        value: Tensor = file.get_tensor(key)
    return value.to(device)


__all__ = ["Kept", "Store"]
