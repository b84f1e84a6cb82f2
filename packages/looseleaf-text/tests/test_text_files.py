"""Text files of other systems, and texts with unusual separators of lines, come back as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from looseleaf import Example, Prompt
from looseleaf.files import lines, read_text, write_text
from looseleaf_text import Template, TextPrompt

ODD = "one\u2028two\x85three\x0bfour\x1cfive\u2029six\x0c"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["unix", "windows", "old mac"])
def test_files_of_any_system(tmp_path: Path, mark: bytes, newline: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(mark + newline.join([b"first", ODD.encode(), b"last"]))
    assert lines(read_text(path)) == ["first", ODD, "last"]
    assert lines(path.read_bytes().decode()) == ["first", ODD, "last"]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", ODD + "\nsecond")
    assert read_text(tmp_path / "a.txt") == ODD + "\nsecond"
    assert (tmp_path / "a.txt").read_bytes() == (ODD + "\nsecond").encode()


@pytest.mark.parametrize("change", [lambda b: b, lambda b: b"\xef\xbb\xbf" + b, lambda b: b.replace(b"\n", b"\r\n")],
                         ids=["as written", "byte-order mark", "windows"])
def test_prompts_hold_any_separator(tmp_path: Path, change: object) -> None:
    prompt = TextPrompt(text=ODD, exemplars=[Example({"text": ODD}, "x")], template="{text}\u2028", stop=("\x85",))
    prompt.save(tmp_path / "p.json")
    (tmp_path / "p.json").write_bytes(change((tmp_path / "p.json").read_bytes()))  # type: ignore[operator]
    assert Prompt.load(tmp_path / "p.json") == prompt
    assert Template(f"[X]{ODD}[Z]").fill({"text": ODD}, "z").filled == f"{ODD}{ODD}z"
