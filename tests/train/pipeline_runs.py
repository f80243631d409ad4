"""Multi-stage runs, P-NOC's and AE-PSL's, on pictures of 64 x 64 with networks that learn nothing in two steps."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.data.synthetic import write_synthetic_dataset
from wsss_dist.data import Dataset, build_dataset
from wsss_dist.pipeline import Pipeline

NET = {"name": "resnet18", "weights": None}
FIXED = {**NET, "norm": "fix"}
TRAIN, VAL = 12, 4  # images of the splits


def maps(name: str, stage: str, kind: str) -> dict[str, Any]:
    """The data section of a training on what `stage` made."""
    return {"maps": {name: {"dir": f"${{{stage}}}/out/train", "kind": kind, "made_by": f"stage {stage}"}}}


def values(root: Path, folder: Path) -> dict[str, Any]:
    """P-NOC, the sections of the config file."""
    second = {"backbone": FIXED, "weights": "${classifier}/model.safetensors"}
    crf = {"iterations": 2}
    return common(root, folder) | {
        "stages": {
            "classifier": {"kind": "train", "method": {"name": "pnoc", "variant": "plain", "backbone": NET}},
            "cam_network": {"kind": "train", "method": {"name": "pnoc", "backbone": NET, "second": second}},
            "cams": {"kind": "cams", "network": "${cam_network}", "scales": [1.0, 0.5]},
            "saliency_network": {
                "kind": "train",
                "method": {"name": "c2am", "backbone": NET},
                "data": maps("hint", "cams", "scores"),
            },
            "saliency": {"kind": "saliency", "network": "${saliency_network}", "scales": [1.0], "crf": crf},
            "refiner": {
                "kind": "train",
                "method": {"name": "poolnet", "backbone": {**NET, "width": 0.125}},
                "data": maps("saliency", "saliency", "grey"),
            },
            "refined": {"kind": "saliency", "network": "${refiner}", "scales": [1.0], "mirror": False}
            | {"peak": False, "threshold": None, "crf": None},
            "labels": {"kind": "affinity_labels", "cams": "${cams}", "saliency": "${refined}", "crf": crf},
            "affinity": {
                "kind": "train",
                "method": {"name": "affinity", "backbone": {**FIXED, "frozen_stages": 5}, "radius": 4},
                "data": maps("labels", "labels", "labels"),
            },
            "walk": {"kind": "random_walk", "network": "${affinity}", "cams": "${cams}", "canvas": 64},
            "masks": {"kind": "pseudo_masks", "scores": "${walk}"},
            "deeplab": {
                "kind": "train",
                "method": {"name": "deeplab", "backbone": NET, "width": 16},
                "data": maps("labels", "masks", "labels"),
            },
            "segmentation": {"kind": "segmentation", "network": "${deeplab}", "scales": [1.0], "splits": ["val"]},
        },
    }


def common(root: Path, folder: Path) -> dict[str, Any]:
    """The sections that every stage has."""
    return {
        "run": {"name": "chain", "dir": str(folder), "seed": 3},
        "data": {"format": "coco", "root": str(root), "eval_splits": ["val"], "crop": 64, "augment": "squash"}
        | {"num_workers": 0, "untagged": "drop"},
        "optim": {"lr": 1e-3, "warmup_steps": 0},
        "train": {"steps": 3, "global_batch": 2, "micro_batch": 2, "engine": "plain", "save_every": 1},
        "report": {"num_images": 2},
    }


def erasing_values(root: Path, folder: Path) -> dict[str, Any]:
    """AE-PSL with three steps of erasing, the sections of the config file."""
    net = {**NET, "output_stride": 16}
    classifier = {"name": "aepsl", "variant": "erasing", "backbone": net}
    stages = {}
    for step in (1, 2, 3):
        before = {} if step == 1 else {"before": f"${{regions_{step - 1}}}"}
        data = {} if step == 1 else {"data": maps("erased", f"regions_{step - 1}", "erased")}
        log = {"log_every": 1}
        stages[f"erasing_{step}"] = {"kind": "train", "method": classifier, "train": log, **data}
        stages[f"regions_{step}"] = {"kind": "regions", "network": f"${{erasing_{step}}}", **before}
    psl = {"name": "aepsl", "variant": "segmentation", "backbone": net}
    stages |= {
        "cams": {"kind": "cams", "network": "${erasing_1}", "scales": [1.0]},
        "masks": {"kind": "region_masks", "regions": "${regions_2}", "cams": "${cams}", "cam_background": 0.3},
        "psl": {"kind": "train", "method": psl, "data": maps("labels", "masks", "labels")},
        "psl_masks": {"kind": "segmentation", "network": "${psl}", "scales": [1.0], "splits": ["train"]},
        "psl_plus": {"kind": "train", "method": psl, "data": maps("labels", "psl_masks", "labels")},
        "segmentation": {"kind": "segmentation", "network": "${psl_plus}", "scales": [1.0], "splits": ["val"]},
        "bound": {"kind": "segmentation", "network": "${psl_plus}", "scales": [1.0], "splits": ["val"]}
        | {"method": {"prohibit_by": "tags"}},
    }
    return common(root, folder) | {"stages": stages}


def dataset(pipeline: Pipeline, split: str) -> Dataset:
    """A split of the run, with its masks."""
    found = build_dataset(pipeline.data, split)
    found.open_masks()
    return found


def start(config: dict[str, Any], only: str | None = None) -> int:
    """Run it on this rank."""
    return Pipeline(config).start(only)


@contextmanager
def one_thread() -> Iterator[None]:
    """As the processes of these tests have: another number of threads gives other sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_data(folder: Path) -> Path:
    """The pictures."""
    return write_synthetic_dataset(folder, TRAIN, VAL, 64, 3, seed=0)


def finished(config: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """Config and folder of a run that nothing disturbed; tests that change it work on a copy."""
    assert start(copy.deepcopy(config)) == 0
    return config, Path(config["run"]["dir"]) / "chain"


def copy_of(whole: tuple[dict[str, Any], Path], target: Path) -> tuple[dict[str, Any], Path]:
    """A finished run in a folder of a test, without checkpoints; weights are links: nothing writes in them."""
    config, folder = whole

    def copy_file(source: str, target: str) -> object:
        return os.link(source, target) if source.endswith(".safetensors") else shutil.copy2(source, target)

    ignore = shutil.ignore_patterns("checkpoints", "tensorboard")
    shutil.copytree(folder, target / "chain", ignore=ignore, copy_function=copy_file)
    config = copy.deepcopy(config)
    config["run"]["dir"] = str(target)
    return config, target / "chain"


def scores(folder: Path) -> dict[str, Any]:
    """Stage -> its scores."""
    result = json.loads((folder / "result.json").read_text())
    return {stage["stage"]: stage["scores"] for stage in result["stages"]}


def outputs(folder: Path) -> dict[str, str]:
    """Stage -> digest of what it made."""
    return {stage.parent.name: json.loads(stage.read_text())["outputs"] for stage in folder.glob("*/stage.json")}


if __name__ == "__main__":  # a process that a test kills
    sys.exit(start(yaml.safe_load(Path(sys.argv[1]).read_text())))
