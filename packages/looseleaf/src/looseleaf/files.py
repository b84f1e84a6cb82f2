"""Files: written atomically, read with errors that say what to do; and where caches go."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def cache_dir() -> Path:
    """Where Looseleaf keeps what it can make again: ``$LOOSELEAF_CACHE`` or the user's cache directory."""
    if own := os.environ.get("LOOSELEAF_CACHE"):
        return Path(own).expanduser()
    local = os.environ.get("LOCALAPPDATA") if os.name == "nt" else None
    return Path(os.environ.get("XDG_CACHE_HOME") or local or Path.home() / ".cache") / "looseleaf"


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside ``path`` to write to, which takes its place at the end of the block; folders are made as needed.

    An exception, a kill or a full disk leaves the former file as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # as the umask says: safetensors puts a file in its place that only the owner may read
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` in UTF-8 to ``path``, atomically."""
    with replacing(path) as part:
        part.write_bytes(text.encode("utf-8"))


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file of any system: without a byte-order mark, with ``\\n`` between lines.

    Raises:
        ValueError: the file cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}. Give a text file in UTF-8") from error


def lines(text: str) -> list[str]:
    """The lines of a text of any system: ``splitlines`` also cuts at U+2028, U+0085 and others, inside lines."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], info: Mapping[str, Any] | None = None, *,
                 format: str) -> None:
    """Write tensors and plain data to one safetensors file, atomically; folders are made as needed.

    Args:
        tensors: of any device; views and tied tensors are written as they look.
        info: kept as JSON in the file's metadata.
        format: name and version of what the file holds, such as ``"looseleaf.masks/2"``.

    Raises:
        ValueError: ``info`` is not JSON.
        OSError: the file cannot be written; the message names the path.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        text = json.dumps(dict(info or {}))
    except TypeError as error:
        raise ValueError(f"{path}: expected metadata of text, numbers, lists and dictionaries, got {error}") from None
    storages: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain[name] = tensor.detach().contiguous()
        storage = plain[name].untyped_storage().data_ptr()
        if storage in storages:  # safetensors refuses two names for one storage
            plain[name] = plain[name].clone()
        storages.add(storage)
    try:
        with replacing(path) as part:
            save_file(plain, part, {"format": format, "info": text})
    except SafetensorError as error:
        raise OSError(f"cannot write {path} ({error}): choose a path that can be written") from error


def load_tensors(path: str | os.PathLike[str], *, format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`save_tensors` wrote: tensors on the CPU, and plain data.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no whole safetensors file, or one of another format.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: expected a file of the format {format!r}, got no file")
    try:
        with safe_open(path, framework="pt") as file:
            head = file.metadata() or {}
            if head.get("format") != format:
                raise ValueError(f"{path}: expected a file of the format {format!r}, got {head.get('format')!r}")
            info = json.loads(head.get("info", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, info  # noqa: SIM118 (no mapping)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): it was cut short, damaged, or is "
                         "something else. Write it again") from error


__all__ = ["cache_dir", "lines", "load_tensors", "read_text", "replacing", "save_tensors", "write_text"]
