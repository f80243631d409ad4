"""What has to be the same on every rank before a run begins, and is not by itself once there are several machines."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsss_dist import dist
from wsss_dist.errors import UserError, collective
from wsss_dist.keys import may_differ_between_nodes

if TYPE_CHECKING:
    from wsss_dist.data.dataset import Dataset

_PACKAGES = ("torch", "torchvision", "deepspeed", "timm", "triton", "numpy", "opencv-python", "pydantic", "safetensors")
# a network file system may show a new file late
_SEEN_WITHIN_S = 60
# a mark as old as this is of a start that was killed
_STALE_S = 3600


def check_same(describe: Callable[[], dict[str, Any]]) -> None:
    """Hold that every rank describes the run in the same way; a collective call.

    Args:
        describe: names of what has to be the same, with values that can be compared and printed.
    Raises:
        UserError: what `describe` raises on any rank, or what differs from rank 0, and on which rank.
    """
    if dist.world_size() == 1:
        describe()
        return
    facts, error = {}, None
    try:
        facts = describe()
    except UserError as caught:  # raised below on every rank: the others would wait for this one
        error = caught
    host = socket.gethostname()
    all_of = dist.all_gather_object((host, error and str(error), facts))
    first = next(((rank, where, text) for rank, (where, text, _) in enumerate(all_of) if text is not None), None)
    if first is not None:
        rank, where, text = first
        mine = error is not None and rank == 0
        raise collective(error if mine else UserError(f"{text} (found by rank {rank} on {where})"))
    host, _, expected = all_of[0]
    for rank, (where, _, found) in enumerate(all_of):
        differ = [key for key in sorted({*expected, *found}) if expected.get(key) != found.get(key)]
        if differ:
            shown = "; ".join(f"{k} is {found.get(k)!r}, on rank 0 {expected.get(k)!r}" for k in differ[:3])
            more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise collective(
                UserError(
                    f"launch: rank {rank} on {where} runs something else than rank 0 on {host}: {shown}{more}; give "
                    "every node the same config, code, packages and data"
                )
            )


def facts_of_config(values: dict[str, Any]) -> dict[str, Any]:
    """Of a config every key but those that a node may have of its own; of the code a digest; versions of packages."""
    config = {f"config '{k}'": v for k, v in flat("", values).items() if not may_differ_between_nodes(k)}
    versions = {f"package {name}": version for name, version in package_versions().items()}
    return {**config, **versions, "Python": platform.python_version(), "code": _code()}


def facts_of_data(split: str, dataset: Dataset) -> dict[str, Any]:
    """Number of images, a digest of their names and tags, and the classes."""
    return {
        f"data of split '{split}'": f"{len(dataset)} images, digest {dataset.digest()[:12]}",
        f"classes of split '{split}'": ", ".join(dataset.class_names),
    }


def package_versions() -> dict[str, str | None]:
    """Of each package that results depend on, the version; None where it is not installed."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def flat(prefix: str, value: Any) -> dict[str, Any]:
    """Nested sections as dotted key -> value."""
    if not isinstance(value, dict):
        return {prefix: value}
    dotted = f"{prefix}." if prefix else ""
    return {k: v for key, inner in value.items() for k, v in flat(f"{dotted}{key}", inner).items()}


def _code() -> str:
    """Digest of the Python sources, edited ones too."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(p for part in ("wsss_dist", "kernels") for p in (root / part).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return f"digest {digest.hexdigest()[:12]}"


def check_shared(folder: Path, key: str = "run.dir") -> None:
    """Hold that every rank sees what rank 0 writes into a folder, which exists there; a collective call.

    Args:
        folder: what to look at.
        key: what says where it is, for the message.
    Raises:
        UserError: a rank does not, so that its part of what is written would be lost.
    """
    if dist.world_size() == 1:
        return
    path = dist.on_main(lambda: _mark(folder))
    mine = folder / path.name
    end = time.monotonic() + _SEEN_WITHIN_S
    while not (seen := _is_there(mine)) and time.monotonic() < end:
        time.sleep(0.5)
    found = dist.all_gather_object((socket.gethostname(), seen, str(folder)))
    dist.on_main(path.unlink)
    for rank, (host, there, place) in enumerate(found):
        if not there:
            raise collective(
                UserError(
                    f"run: {found[0][2]} is not shared: rank {rank} on {host} does not find in {place} what rank 0 on "
                    f"{found[0][0]} wrote; set {key} to a folder that all nodes have in common"
                )
            )


def _mark(folder: Path) -> Path:
    """Make a mark; those of earlier starts go, which were killed while the ranks looked for them."""
    for old in folder.glob(".shared-*"):
        try:
            if time.time() - old.stat().st_mtime > _STALE_S:
                old.unlink()
        except FileNotFoundError:  # another start was faster
            pass
    path = folder / f".shared-{secrets.token_hex(8)}"
    path.touch()
    return path


def _is_there(path: Path) -> bool:
    try:
        return path.name in os.listdir(path.parent)  # NFS keeps in mind which single files were not there
    except OSError:
        return False
