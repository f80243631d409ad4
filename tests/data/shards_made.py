"""What the tests of shards share: writing them, damaging them, and .tar files of others."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from tests.data import sets
from wsss_dist.data import DataConfig
from wsss_dist.data.prepare.shards import prepare_shards


def quiet(line: str) -> None:
    pass


def write(root: Path, out: Path, split: str = "train", form: str = "coco", **changes) -> Path:
    prepare_shards(
        f"{form}:{root}", split, out, **{"size": 6000, "masks": False, "classes": None, "say": quiet, **changes}
    )
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def config(root: Path | str, **changes) -> DataConfig:
    return sets.config(root, "shards", **changes)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 255
    path.write_bytes(content)


def tar(path: Path, members: dict[str, bytes], **kind) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **kind) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name.rstrip("+"))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def jpeg(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    sets.picture(seed=seed).save(buffer, "JPEG")
    return buffer.getvalue()
