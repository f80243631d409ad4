"""A cache of shards: copied once, whole or not at all, within its bound, whatever the other processes do."""

from __future__ import annotations

import fcntl
import hashlib
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from tests.data.shards_made import config, flip
from tests.data.test_loader import N
from wsss_dist.data import build_dataset
from wsss_dist.data.shard_cache import ShardCache
from wsss_dist.data.shard_files import LocalFolder
from wsss_dist.data.shard_index import Shard
from wsss_dist.errors import UserError


class Counted(LocalFolder):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.copies: list[str] = []

    def copy(self, file, into):
        self.copies.append(file)
        super().copy(file, into)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "origin").mkdir()
    return Counted(tmp_path / "origin")


def shard(place: Counted, name: str, size: int = 1000) -> Shard:
    content = np.random.default_rng(len(name)).bytes(size - 1) + name[-1:].encode()
    (place.folder / name).write_bytes(content)
    return Shard(name, size, hashlib.sha256(content).hexdigest())


def names(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {"lock"}


def test_a_shard_is_copied_once(place, tmp_path):
    one = shard(place, "a")
    cache = ShardCache(tmp_path / "cache", 10_000)
    for _ in range(3):
        assert cache.read(one, 10, 20, place) == (place.folder / "a").read_bytes()[10:30]
    assert ShardCache(tmp_path / "cache", 10_000).read(one, 0, 1000, place) == (place.folder / "a").read_bytes()
    assert place.copies == ["a"] and names(tmp_path / "cache") == {f"{one.sha256}.tar"}


def test_the_least_recently_used_makes_room_unless_it_is_in_use(place, tmp_path):
    a, b, c, d = (shard(place, name) for name in "abcd")
    first = ShardCache(tmp_path / "cache", 2500)
    for k, one in enumerate((a, b)):
        assert first.read(one, 0, 8, place)
        os.utime(tmp_path / "cache" / f"{one.sha256}.tar", (k, k))
    second = ShardCache(tmp_path / "cache", 2500)
    assert second.read(c, 0, 8, place) is None  # both are open
    assert names(tmp_path / "cache") == {f"{a.sha256}.tar", f"{b.sha256}.tar"}
    del first
    assert second.read(c, 0, 8, place) is None  # it looks for room again after a minute
    third = ShardCache(tmp_path / "cache", 2500)
    assert third.read(d, 0, 8, place) is not None
    assert names(tmp_path / "cache") == {f"{b.sha256}.tar", f"{d.sha256}.tar"}
    assert third.read(shard(place, "large", 3000), 0, 8, place) is None
    assert names(tmp_path / "cache") == {f"{b.sha256}.tar", f"{d.sha256}.tar"}


def test_a_copy_that_is_only_read_is_in_use_too(place, tmp_path):
    a, b = shard(place, "a"), shard(place, "b")
    ShardCache(tmp_path / "cache", 1500).read(a, 0, 8, place)
    reader = ShardCache(tmp_path / "cache", 1500)
    assert reader.read(a, 0, 8, place) and ShardCache(tmp_path / "cache", 1500).read(b, 0, 8, place) is None
    del reader
    assert ShardCache(tmp_path / "cache", 1500).read(b, 0, 8, place) and names(tmp_path / "cache") == {
        f"{b.sha256}.tar"
    }


def test_what_others_do_while_a_shard_is_copied(place, tmp_path, monkeypatch):
    """They neither copy it too, nor give its room away, nor take its copy for one that was left."""
    a, b = shard(place, "a"), shard(place, "b")
    seen = []

    def copied(self, file, into):
        into.write((place.folder / file).read_bytes()[:400])
        if file == "a":
            other = ShardCache(tmp_path / "cache", 1500)
            seen.append((other.read(a, 0, 8, place), other.read(b, 0, 8, place), names(tmp_path / "cache")))
        into.write((place.folder / file).read_bytes()[400:])

    monkeypatch.setattr(Counted, "copy", copied)
    assert ShardCache(tmp_path / "cache", 1500).read(a, 0, 1000, place) == (place.folder / "a").read_bytes()
    assert seen == [(None, None, {f"{a.sha256}.part"})]


def test_a_copy_left_by_a_killed_process_is_made_again(place, tmp_path):
    a, b = shard(place, "a"), shard(place, "b")
    (tmp_path / "cache").mkdir()
    for one in (a, b):
        (tmp_path / "cache" / f"{one.sha256}.part").write_bytes(b"x" * 1000)
    cache = ShardCache(tmp_path / "cache", 1000)  # room for one: the other has to go
    assert cache.read(a, 0, 1000, place) == (place.folder / "a").read_bytes()
    assert names(tmp_path / "cache") == {f"{a.sha256}.tar"}


def test_a_copy_with_another_checksum_is_not_kept(place, tmp_path):
    one = shard(place, "a")
    flip(place.folder / "a", 500)
    with pytest.raises(UserError, match="origin/a has SHA-256 .*its index says .*copy it again"):
        ShardCache(tmp_path / "cache", 10_000).read(one, 0, 8, place)
    assert names(tmp_path / "cache") == set()


def _bytes(cache: Path) -> int:
    """Bytes on the disk at one moment: nothing is renamed or begun while the lock is held."""
    used = 0
    with (cache / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in cache.iterdir():
            with suppress(FileNotFoundError):
                used += path.stat().st_size
    return used


def test_many_processes_share_a_cache(place, tmp_path):
    """Seven processes read 8 shards in their own orders; the cache holds 5. All get the right bytes, none is torn."""
    shards = [shard(place, name, 50_000) for name in "abcdefgh"]
    whole = {one.file: (place.folder / one.file).read_bytes() for one in shards}
    children = []
    for seed in range(7):
        if (child := os.fork()) == 0:
            status = 1
            try:
                cache, kept = ShardCache(tmp_path / "cache", 250_000), 0
                for k in np.random.default_rng(seed).integers(8, size=60):
                    content = cache.read(shards[k], 1000, 40_000, place)
                    kept += content is not None
                    assert content in (None, whole[shards[k].file][1000:41_000])
                    assert _bytes(tmp_path / "cache") <= 250_000
                status = 0 if kept else 2
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 7
    assert len(names(tmp_path / "cache")) == 5
    for path in (tmp_path / "cache").glob("*.tar"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem


def test_a_damaged_copy_is_left_for_the_origin(made, tmp_path):
    cfg = config(made, cache={"dir": tmp_path / "cache", "gb": 1})
    right = [build_dataset(config(made), "train").image(i) for i in range(N)]
    assert all((build_dataset(cfg, "train").image(i) == right[i]).all() for i in range(N))
    damaged = sorted((tmp_path / "cache").glob("*.tar"))
    for path in damaged:
        path.write_bytes(b"\1" * path.stat().st_size)
    data = build_dataset(cfg, "train")
    assert all((data.image(i) == right[i]).all() for i in range(N))
