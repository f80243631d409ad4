"""A small data set and shards made of it, for the tests of shards."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.data.shards_made import write
from tests.data.synthetic import write_synthetic_dataset
from tests.data.test_loader import N


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_synthetic_dataset(tmp_path_factory.mktemp("shards") / "set", N, 5, 40, 3, seed=0)


@pytest.fixture(scope="module")
def made(scenes):
    write(scenes, scenes.parent / "out" / "set")
    return write(scenes, scenes.parent / "out" / "set", "val", masks=True)


@pytest.fixture
def copy(made, tmp_path):
    """A copy of the shards, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "set"))


@pytest.fixture(scope="module")
def in_memory(made):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(made), "/bucket/set", recursive=True)
    yield "memory://bucket/set"
    memory.rm("/bucket", recursive=True)
