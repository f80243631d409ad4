"""Writes the archives of official.py, and MATLAB files as SBD has them."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def write_folder(folder: Path, contents: Iterator[tuple[str, bytes]]) -> None:
    """Files; those of the same bytes in one folder share their place on the disk."""
    first: dict[tuple[Path, bytes], tuple[Path, int]] = {}
    for name, content in contents:
        path = folder / name
        if path.parent not in {key[0] for key in first}:
            path.parent.mkdir(parents=True, exist_ok=True)
        twin, links = first.get((path.parent, content), (None, 0))
        if twin is None or links > 10_000:
            path.write_bytes(content)
            first[path.parent, content] = (path, 0)
        else:
            os.link(twin, path)
            first[path.parent, content] = (twin, links + 1)


def write_zip(path: Path, contents: Iterator[tuple[str, bytes]], top: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(top), b"")
        for name, content in contents:
            archive.writestr(zipfile.ZipInfo(name), content)


def write_tar(path: Path, contents: Iterator[tuple[str, bytes]], mode: str) -> None:
    options = {"compresslevel": 1} if mode.endswith("gz") else {}
    with tarfile.open(path, mode, format=tarfile.GNU_FORMAT, **options) as archive:
        folders: set[str] = set()
        for name, content in contents:
            parents = [name[:k] for k, letter in enumerate(name) if letter == "/"]
            for parent in (p for p in parents if p not in folders):
                entry = tarfile.TarInfo(parent)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(entry)
            folders.update(parents)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def mat(variable: str, ids: np.ndarray, packed: bool) -> bytes:
    """A MATLAB file of level 5 with the struct of SBD: Boundaries (a cell), Segmentation, CategoriesPresent."""

    def element(kind: int, data: bytes) -> bytes:
        if 0 < len(data) <= 4:
            return struct.pack("<HH", kind, len(data)) + data.ljust(4, b"\0")
        return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)

    def matrix(kind: int, dims: tuple, name: bytes, rest: bytes) -> bytes:
        head = element(6, struct.pack("<II", kind, 0)) + element(5, struct.pack(f"<{len(dims)}i", *dims))
        return element(14, head + element(1, name) + rest)

    numbers = matrix(9, ids.shape, b"", element(2, ids.astype(np.uint8).tobytes(order="F")))
    present = matrix(6, (1, 2), b"", element(9, struct.pack("<dd", 3, 7)))
    cell = matrix(1, (2, 1), b"", present + present)
    fields = b"".join(name.ljust(32, b"\0") for name in (b"Boundaries", b"Segmentation", b"CategoriesPresent"))
    rest = element(5, struct.pack("<i", 32)) + element(1, fields) + cell + numbers + present
    content = matrix(2, (1, 1), variable.encode(), rest)
    if packed:
        content = zlib.compress(content)
        content = struct.pack("<II", 15, len(content)) + content
    return b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x01IM" + content
