"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

_numbers = itertools.count()


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside ``path`` to write to; what was written takes the place of ``path`` at the end of the block.

    An exception, a kill or a full disk leaves the former file as it was. Folders are made as needed.

    Raises:
        OSError: the file cannot be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Opened the plain way, unlike a temporary file of the standard library: others may read it as the umask says.
    part = target.with_name(f".{target.name}.{os.getpid()}-{next(_numbers)}.part")
    try:
        part.open("xb").close()
        yield part
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` in UTF-8 to ``path``, whole or not at all."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
