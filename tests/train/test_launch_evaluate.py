"""launch/evaluate.py and launch/report.py on a run that was really trained: two steps of a small classifier."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from tests.data.synthetic import write_synthetic_dataset
from wsss_dist.config import parse_config
from wsss_dist.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    write_synthetic_dataset(folder / "data", 6, 5, 48, 3, seed=0)
    torch.manual_seed(5)
    start = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    save_file(start, folder / "start.safetensors", {"note": "drawn at random"})
    backbone = {"name": "vit_tiny_patch16_224", "weights": str(folder / "start.safetensors"), "frozen_blocks": 9}
    backbone["token_cache"] = str(folder / "tokens")
    values = {
        "run": {"name": "small", "dir": str(folder)},
        "method": {"name": "classifier", "backbone": backbone},
        "data": {"format": "coco", "root": str(folder / "data"), "eval_splits": ["val"], "crop": 32}
        | {"augment": "squash", "num_workers": 0},
        "optim": {"lr": 1e-2, "warmup_steps": 0},
        "train": {"steps": 2, "global_batch": 2, "micro_batch": 2, "engine": "plain"},
        "eval": {"size": 32, "cam_scales": [1.0], "seg_scales": [1.0]},
        "report": {"num_images": 2},
    }
    assert Trainer(parse_config(values)).train() == 0
    return folder / "small"


def launch(script, *args):
    """In a process of its own, as a user starts it."""
    command = [sys.executable, str(ROOT / "launch" / script), *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)


def call(monkeypatch, script, *args):
    """The same in this process, which costs no imports; returns the exit status."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
    return runpy.run_path(str(ROOT / "launch" / script))["main"]()


def test_training_ends_with_result_samples_and_report(run_dir):
    result = json.loads((run_dir / "result.json").read_text())
    assert result["splits"]["val"]["images"] == 5 and result["splits"]["val"]["step"] == 2
    assert [p.name for p in sorted((run_dir / "samples" / "val").iterdir())] == ["000000.npz", "000002.npz"]
    assert (run_dir / "report" / "samples_val_1.png").is_file() and (run_dir / "report" / "loss.png").is_file()
    assert "images_per_s" not in (run_dir / "metrics.jsonl").read_text(), "speed stays out of what is compared"


def test_evaluating_again_gives_the_result_of_the_training(run_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    (copy / "result.json").unlink()
    done = launch("evaluate.py", "--run", copy)
    assert done.returncode == 0, done.stderr
    before, after = (json.loads((r / "result.json").read_text()) for r in (run_dir, copy))
    kinds = [r["splits"]["val"]["kinds"] for r in (before, after)]
    assert kinds[0] == kinds[1], "the weights of the checkpoint are those that were evaluated"
    assert after["weights_note"] == before["weights_note"] == "drawn at random"
    assert "val          CAM " in done.stdout and done.stdout.splitlines()[-1] == f"report: {copy}/report.html"


@pytest.mark.parametrize("weights", ["moved.safetensors", "timm"])
def test_the_weights_at_the_start_are_not_needed_again(weights, run_dir, tmp_path, monkeypatch):
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    tokens = run_dir.parent / "tokens"
    before = sorted(tokens.rglob("*.npy"))
    torch.manual_seed(7)
    setting = f"method.backbone.weights={weights}"
    assert call(monkeypatch, "evaluate.py", "--run", copy, "--set", setting, "--set", "eval.batch=1") == 0
    old, new = (json.loads((r / "result.json").read_text()) for r in (run_dir, copy))
    assert new["splits"]["val"]["kinds"] == old["splits"]["val"]["kinds"]
    if weights != "timm":
        assert new["weights_note"] == "drawn at random", "what the training wrote down"
    assert sorted(tokens.rglob("*.npy")) == before, "the cache is that of the weights of the checkpoint"
    shutil.rmtree(tokens)
    assert call(monkeypatch, "evaluate.py", "--run", copy, "--set", setting) == 0
    new = json.loads((copy / "result.json").read_text())
    assert new["splits"]["val"]["kinds"] == old["splits"]["val"]["kinds"]


def test_mistakes_are_one_sentence(run_dir, tmp_path, monkeypatch, capsys):
    empty = tmp_path / "no_checkpoint"
    empty.mkdir()
    shutil.copy(run_dir / "config.yaml", empty)
    cases = [
        ("evaluate.py", ["--run", tmp_path], "holds no config.yaml"),
        ("evaluate.py", ["--run", empty], "holds no good checkpoint"),
        ("evaluate.py", ["--run", run_dir, "--set", "method.backbone.name=vit_small_patch16_224"], "of another model"),
        ("report.py", ["--run", tmp_path], "result.json is missing"),
    ]
    for script, args, message in cases:
        assert call(monkeypatch, script, *args) == 2, args
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1, error


def test_compare(run_dir, tmp_path, monkeypatch):
    assert call(monkeypatch, "report.py", "--compare", run_dir, run_dir, "--out", tmp_path / "table.md") == 0
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert f"| {config['run']['name']} | 2 |" in (tmp_path / "table.md").read_text()
