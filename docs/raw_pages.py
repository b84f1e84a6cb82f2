"""Every page of the site also as Markdown, beside its HTML: for whoever reads with a program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_TEXTS: dict[str, str] = {}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> None:
    """Called for each page before it becomes HTML."""
    _TEXTS[page.file.src_uri] = markdown


def on_post_build(config: Any, **_: Any) -> None:
    """Called when all HTML is written."""
    for name, text in _TEXTS.items():
        path = Path(config.site_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
