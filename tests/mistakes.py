"""How the mistakes of test_mistakes.py are made: in a folder of their own, on copies of a finished run and its data."""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import kernels
from tests.data import sets
from tests.data.synthetic import write_synthetic_dataset
from wsss_dist import dist
from wsss_dist.data import build_dataset
from wsss_dist.data.prepare.shards import prepare_shards

ROOT = Path(__file__).resolve().parents[1]
TINY = "vit_tiny_patch16_224"


def _script(name: str):
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def base(folder: Path, data: Path) -> dict:
    """A run that works."""
    return {
        "run": {"name": "done", "dir": str(folder / "runs")},
        "method": {"name": "classifier", "backbone": {"name": TINY, "weights": None, "frozen_blocks": 9}},
        "data": {"format": "coco", "root": str(data), "eval_splits": ["val"], "crop": 32, "num_workers": 0},
        "optim": {"lr": 1e-4, "warmup_steps": 0},
        "train": {"steps": 2, "global_batch": 4, "micro_batch": 2, "engine": "plain"},
        "eval": {"size": 32, "cam_scales": [1.0], "seg_scales": [1.0], "crf": None},
        "report": {"num_images": 1},
    }


def status_of(script: str, arguments: list, patch: pytest.MonkeyPatch) -> int:
    """Run a launch script in this process, which costs no imports; its exit status."""
    patch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
    return _script(script).main()


def finish_a_run(folder: Path) -> Path:
    """Fill a folder with data/ and runs/done, a finished run of `base`."""
    write_synthetic_dataset(folder / "data", 6, 4, 32, 3, seed=0)
    (folder / "base.yaml").write_text(yaml.safe_dump(base(folder, folder / "data")))
    with pytest.MonkeyPatch.context() as patch:
        assert status_of("train", ["--config", folder / "base.yaml"], patch) == 0
    return folder


class Place:
    """Where one mistake is made: an empty folder, and copies of what works on demand."""

    def __init__(self, folder: Path, finished: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.finished, self.patch = folder, finished, patch
        self.config = folder / "base.yaml"
        self.config.write_text(yaml.safe_dump(base(folder, finished / "data")))
        self.kept: list = []  # what has to live until the command has ended
        self._environment = dict(os.environ)

    def data(self) -> Path:
        """A copy of the data."""
        return shutil.copytree(self.finished / "data", self.folder / "data")

    def run(self) -> Path:
        """A copy of the finished run, which `self.config` would go on with."""
        return shutil.copytree(self.finished / "runs/done", self.folder / "runs/done")

    def leave(self) -> None:
        """Take back what outlives a command."""
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        for thing in self.kept:
            for name in ("release", "close"):
                getattr(thing, name, lambda: None)()
        self.kept.clear()
        kernels.configure()
        dist.shutdown()
        os.environ.clear()
        os.environ.update(self._environment)

    def write(self, text: str) -> Path:
        """A config file of this text."""
        self.config.write_text(text)
        return self.config


Call = tuple  # script, argument, argument, ...


def train(*settings: str) -> Callable[[Place], Call]:
    """Training with these settings."""
    return lambda at: ("train", "--config", at.config, *(x for s in settings for x in ("--set", s)))


def text(change: Callable[[str], str]) -> Callable[[Place], Call]:
    """Training with a changed config file."""
    return lambda at: ("train", "--config", at.write(change(at.config.read_text())))


def prepared(prepare: Callable[[Place], object], *settings: str) -> Callable[[Place], Call]:
    """Training after `prepare`, whose return value stands for {} in the settings."""

    def provoke(at: Place) -> Call:
        made = prepare(at)
        return train(*(s.replace("{}", str(made)) for s in settings))(at)

    return provoke


def coco(change: Callable[[dict], object], split: str = "train") -> Callable[[Place], Call]:
    """Training with a changed annotation file."""
    return prepared(lambda at: sets.rewrite(at.data(), change, split), "data.root={}")


def files(change: Callable[[Path], object], *settings: str) -> Callable[[Place], Call]:
    """Training with changed files in the data folder."""

    def prepare(at: Place) -> Path:
        root = at.data()
        change(root)
        return root

    return prepared(prepare, "data.root={}", *settings)


def folder(rows: list[str] | None = None, change: Callable[[Path], object] = lambda root: None):
    """Training on a data set of the folder format."""

    def prepare(at: Place) -> Path:
        root = sets.write_folder(at.folder / "own", rows)
        change(root)
        return root

    few = ("train.global_batch=2", "data.eval_splits=[train]")
    return prepared(prepare, "data.format=folder", "data.root={}", *few)


def maps(change: Callable[[Path], object], *settings: str) -> Callable[[Place], Call]:
    """Training with maps of an earlier stage, after `change` of their folder; {} in the settings is the one above."""

    def prepare(at: Place) -> Path:
        sets.write_maps(at.folder / "earlier", build_dataset(sets.config(at.data()), "train"))
        change(at.folder / "earlier")
        return at.folder

    hint = "data.maps.hint={dir: {}/earlier/hint, kind: scores, made_by: stage cams}"
    return prepared(prepare, "data.root={}/data", hint, *settings)


def shards(change: Callable[[Path], object], *settings: str) -> Callable[[Place], Call]:
    """Training on shards of the data, after `change` of the folder of the training split."""

    def prepare(at: Place) -> Path:
        source = f"coco:{at.finished / 'data'}"
        for split in ("train", "val"):
            prepare_shards(
                source, split, at.folder / "sh", size=4000, masks=split == "val", classes=None, say=lambda line: None
            )
        change(at.folder / "sh/train")
        return at.folder / "sh"

    return prepared(prepare, "data.format=shards", "data.root={}", *settings)


def mask(values: dict, size: tuple[int, int] = (32, 32)) -> Callable[[Place], Call]:
    """Training with another mask of the second validation image."""
    return files(lambda root: sets.add_mask(root, "00001.png", values, size, "masks/val"))


def weights(name: str, content: Callable[[Path], object]) -> Callable[[Place], Call]:
    """Training with a weights file."""

    def prepare(at: Place) -> Path:
        content(at.folder / name)
        return at.folder / name

    return prepared(prepare, "method.backbone.weights={}")


def nothing(folder: Path) -> None:
    """Leave it as it is."""


def again(change: Callable[[Path], object], *arguments: str, script: str = "train") -> Callable[[Place], Call]:
    """Going on with the finished run (arguments: settings), or another script on it, after `change` of its folder.

    {} in the arguments is the folder of the run.
    """

    def provoke(at: Place) -> Call:
        run = at.run()
        at.kept.append(change(run))
        filled = [a.replace("{}", str(run)) for a in arguments]
        return train(*filled)(at) if script == "train" else (script, "--run", run, *filled)

    return provoke


def patched(target: str, value: object, *settings: str) -> Callable[[Place], Call]:
    """Training where something of the machine is stood in for."""
    return prepared(lambda at: at.patch.setattr(target, value), *settings)


def command(*arguments: str, change: Callable[[Path], object] = lambda folder: None) -> Callable[[Place], Call]:
    """A script with arguments, where {} is a folder, empty but for what `change` does."""

    def provoke(at: Place) -> Call:
        (at.folder / "empty").mkdir()
        change(at.folder / "empty")
        return tuple(a.replace("{}", str(at.folder / "empty")) for a in arguments)

    return provoke


def environment(at: Place, **values: str) -> None:
    known = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name in (*known, *(n for n in os.environ if n.startswith("SLURM_"))):
        at.patch.delenv(name, raising=False)
    for name, value in values.items():
        at.patch.setenv(name, value)


def taken_port(at: Place) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    at.kept.append(server)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    environment(at, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", **place)


def small_files(limit: int, *settings: str) -> Callable[[Place], Call]:
    """Training where no file may grow beyond `limit` bytes: to a program that is a full disk."""

    def provoke(at: Place) -> Call:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return train(*settings)(at)

    return provoke


def offline(at: Place) -> None:
    at.patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    at.patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(at.folder / "hub"))


def damage(run: Path) -> None:
    for path in run.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])


def memory_full(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def cut(path: Path, behind: str | None = None) -> None:
    """Leave the first half of a file, or what there is up to the end of the first `behind`."""
    data = path.read_bytes()
    path.write_bytes(data[: data.index(behind.encode()) + len(behind) if behind else len(data) // 2])


def blank(path: Path) -> None:
    """Another content of the same length."""
    path.write_bytes(bytes(path.stat().st_size))


def other_weights(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"stem.conv.weight": torch.zeros(2, 3, 3, 3)}, path)


def cut_weights(path: Path) -> None:
    other_weights(path)
    cut(path)


def put(content: dict, *path_and_value: object) -> None:
    *path, key, value = path_and_value
    for step in path:
        content = content[step]
    content[key] = value
