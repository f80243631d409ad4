"""Whole runs of the trainer on a synthetic data set: artifacts, interruption, damaged images, the command."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.data.synthetic import write_synthetic_dataset
from tests.train import tiny, work
from tests.train.ranks import run_ranks
from wsss_dist.checkpoint import _digest
from wsss_dist.config import parse_config
from wsss_dist.errors import UserError
from wsss_dist.log import RunLog
from wsss_dist.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def data(tmp_path):
    root = write_synthetic_dataset(tmp_path / "data", 12, 3, 32, 3, seed=1)
    section = {"format": "coco", "root": str(root), "eval_splits": ["val"], "crop": 16, "num_workers": 0}
    train = {"steps": 8, "global_batch": 4, "micro_batch": 2, "log_every": 1, "eval_every": 3, "save_every": 5}
    return {"data": section, "train": train}


def run(values: dict) -> int:
    """One call of the command, without the launcher."""
    return Trainer(parse_config(values)).train()


def _values(tmp_path: Path, data: dict, name: str, **changes: object) -> dict:
    values = tiny.values(tmp_path, **changes)
    values["run"]["name"] = name
    values["data"] = data["data"]
    values["train"] = {**data["train"], **values["train"]} if "train" in changes else {**data["train"]}
    values["train"].update({k.removeprefix("train__"): v for k, v in changes.items() if k.startswith("train__")})
    return values


def test_a_run_interrupted_three_times_leaves_the_files_of_one_that_was_not(data, tmp_path):
    whole = _values(tmp_path, data, "whole", train__zero_stage=1)
    assert run_ranks(2, tmp_path, run, whole) == [0, 0]
    cut = _values(tmp_path, data, "cut", train__zero_stage=1, train__stop_after=3)
    assert run_ranks(2, tmp_path, run, cut) == [0, 0]
    assert run_ranks(2, tmp_path, run, cut) == [0, 0], "nothing to do"
    signalled = _values(tmp_path, data, "cut", train__zero_stage=1)
    signalled["method"] = {"name": "tiny", "signal_step": 5}
    (tmp_path / "cut/checkpoints").rename(tmp_path / "cut/aside")  # its method differs in signal_step: start again
    assert run_ranks(2, tmp_path, run, signalled) == [75, 75]
    assert (tmp_path / "cut/checkpoints/ckpt-6/manifest.json").exists()
    assert run_ranks(2, tmp_path, run, signalled) == [0, 0]

    folder = tmp_path / "whole"
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "result.json", "report.html", "tensorboard"):
        assert (folder / name).exists(), name
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["ckpt-5", "ckpt-8"]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["world_size"] == 2 and environment["packages"]["torch"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8]
    assert lines[3]["split"] == "val" and "miou" in lines[3]["eval"]["cam"]
    assert {"loss", "tag", "lr"} <= set(lines[0])
    assert (folder / "metrics.jsonl").read_text() == (tmp_path / "cut/metrics.jsonl").read_text()
    assert (folder / "lock.json").read_text() == ""


def _signalled_in_evaluation(values: dict, step: int | None) -> int:
    """A run in which one rank gets a SIGTERM at its first image of the evaluation after a step; None: of the last."""
    original, sent = tiny.Method.predict, Path(values["run"]["dir"]) / f"sent-{step}"

    def predict(self, batch, views):
        if views.step == step and not sent.exists():
            sent.touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, views)

    tiny.Method.predict = predict
    try:
        return run(values)
    finally:
        tiny.Method.predict = original


def test_a_signal_in_an_evaluation_ends_the_run_and_the_next_start_repeats_it(tmp_path):
    root = write_synthetic_dataset(tmp_path / "data", 8, 12, 32, 3, seed=1)
    section = {"format": "coco", "root": str(root), "eval_splits": ["val"], "crop": 16, "num_workers": 0}
    train = {"steps": 4, "global_batch": 4, "micro_batch": 2, "log_every": 1, "eval_every": 2, "engine": "plain"}
    values = {name: _values(tmp_path, {"data": section, "train": train}, name) for name in ("whole", "cut")}
    for name in values:
        values[name]["eval"]["batch"] = 1
    assert run_ranks(2, tmp_path, run, values["whole"]) == [0, 0]
    for step, checkpoint in ((2, "ckpt-2"), (None, "ckpt-4")):
        assert run_ranks(2, tmp_path, _signalled_in_evaluation, values["cut"], step) == [75, 75]
        assert (tmp_path / "cut/checkpoints" / checkpoint / "manifest.json").exists()
        assert not (tmp_path / "cut/result.json").exists() and (tmp_path / "cut/lock.json").read_text() == ""
    assert run_ranks(2, tmp_path, run, values["cut"]) == [0, 0]
    whole, cut = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut"))
    assert whole == cut
    one, other = (json.loads((tmp_path / name / "result.json").read_text())["splits"]["val"] for name in values)
    assert one["kinds"] == other["kinds"]


def test_damaged_images_are_counted_over_ranks_and_stop_the_run(data, tmp_path):
    images = sorted((tmp_path / "data/images/train").iterdir())
    for path in images[2:5]:
        path.write_bytes(b"no image")
    values = _values(tmp_path, data, "a", train__engine="plain")
    values["data"] = {**data["data"], "max_damaged": 2, "eval_splits": []}
    values["train"]["eval_every"] = None
    for kind, message in run_ranks(2, tmp_path, run, values, fails=True):
        assert kind == "UserError"
        assert "3 images cannot be read" in message and "'data.max_damaged' is 2" in message and ".jpg" in message
    values["run"]["name"], values["data"]["max_damaged"] = "b", 3
    assert run_ranks(2, tmp_path, run, values) == [0, 0]


def _refused(values: dict) -> str:
    with pytest.raises(UserError) as error:
        run(values)
    return str(error.value)


def test_a_folder_with_checkpoints_is_not_started_afresh(data, tmp_path):
    values = _values(tmp_path, data, "a", train__engine="plain", train__stop_after=1)
    assert run_ranks(1, tmp_path, run, values) == [0]
    values["train"]["resume"] = False
    for messages in run_ranks(1, tmp_path, work.each, _refused, [values, values]):  # in one process: the lock is free
        for message in messages:
            assert "'train.resume' is false" in message and "run.name" in message


def _listen(values: dict) -> str:
    """What a call of the command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run(values) == 0
    return out.getvalue()


def test_other_settings_than_those_of_the_checkpoint_are_told(data, tmp_path):
    values = _values(tmp_path, data, "a", train__engine="plain", train__stop_after=1)
    (first,) = run_ranks(1, tmp_path, _listen, values)
    values["optim"]["lr"] = 2e-3
    values["data"] = {**data["data"], "flip": False, "max_damaged": 4}
    values["train"]["stop_after"] = 2
    second, third = run_ranks(1, tmp_path, work.each, _listen, [values, values])[0]
    assert (
        "from step 1 on, other settings than before: 'data.flip' is False, was True, 'optim.lr' is 0.002, was" in second
    )
    assert "other settings" not in first + third and "max_damaged" not in second


def _keep_images(root: Path, keep: int) -> None:
    """Take all but so many images, and what is said of them, out of the training split."""
    path = root / "annotations/train.json"
    content = json.loads(path.read_text())
    content["images"] = content["images"][:keep]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    path.write_text(json.dumps(content))


def _of_an_older_version(folder: Path) -> None:
    """Make the checkpoint one that knows nothing of its data."""
    path = folder / "manifest.json"
    manifest = {k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"}
    del manifest["images"]
    path.write_text(json.dumps({**manifest, "sha256": _digest(manifest)}))


def test_a_run_does_not_go_on_with_other_data(data, tmp_path):
    values = _values(tmp_path, data, "a", train__engine="plain", train__stop_after=1)
    assert run_ranks(1, tmp_path, run, values) == [0]
    values["train"]["stop_after"] = 2
    values["data"] = {**data["data"], "root": str(shutil.copytree(tmp_path / "data", tmp_path / "moved"))}
    (said,) = run_ranks(1, tmp_path, _listen, values)
    assert "other settings" not in said, "the same data at another place"
    _keep_images(tmp_path / "moved", 8)
    values["train"]["stop_after"] = 3
    for kind, message in run_ranks(2, tmp_path, run, values, fails=True):
        assert kind == "UserError" and "\n" not in message
        assert "trained on 12 images, digest " in message and "now has 8 images, digest" in message
        assert "put the data back" in message and "another run.name" in message
    _of_an_older_version(tmp_path / "a/checkpoints/ckpt-2")
    (said,) = run_ranks(1, tmp_path, _listen, values)
    assert "resumed after step 2" in said and "other settings" not in said


@pytest.mark.parametrize("engine", [{"engine": "plain"}, {"engine": "deepspeed", "zero_stage": 3}])
def test_a_run_goes_on_where_the_weights_it_started_from_are_gone(engine, data, tmp_path):
    """From other weights than those at the start; the frozen ones, and their token cache, are the checkpoint's."""
    torch.manual_seed(5)
    start = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    save_file(start, tmp_path / "start.safetensors")
    backbone = {"name": "vit_tiny_patch16_224", "frozen_blocks": 9, "token_cache": str(tmp_path / "tokens")}
    runs = []
    for name, weights, stop in (("whole", "start", None), ("cut", "start", 1), ("cut", None, None)):
        values = _values(tmp_path, data, name)
        weights = weights and str(tmp_path / "start.safetensors")
        values["method"] = {"name": "classifier", "backbone": {**backbone, "weights": weights}}
        values["data"] = {**data["data"], "crop": 32, "augment": "squash"}
        values["train"] |= {"steps": 2, "eval_every": None, "stop_after": stop, **engine}
        values["optim"]["warmup_steps"] = 0
        values["eval"]["size"] = 32
        runs.append(values)
    assert run_ranks(1, tmp_path, work.each, run, runs) == [[0, 0, 0]]
    whole, cut = (load_file(tmp_path / name / "checkpoints/ckpt-2/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "cut")]
    assert results[0]["splits"]["val"]["kinds"] == results[1]["splits"]["val"]["kinds"]
    assert len(list((tmp_path / "tokens").iterdir())) == 1, "tokens of one set of frozen weights"


def test_the_log_drops_what_lies_past_the_resumed_step_and_half_a_line(tmp_path):
    first = RunLog(tmp_path, total=10, batch=4, every=2, enabled=True)
    first.start(0)
    for done in range(1, 9):
        first.step(done, {"loss": float("nan") if done == 4 else 1.0 / done, "lr": 0.1})
    first.evaluation(4, "val", {"cam": {"miou": 0.5}})
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    second = RunLog(tmp_path, total=10, batch=4, every=2, enabled=True)
    second.start(4)
    second.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 4]
    assert lines[2]["loss"] is None, "JSON has no NaN"
    assert second.evaluated(4, "val") and not second.evaluated(2, "val")


def _command(*args: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"}
    pipes: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*args], cwd=ROOT, env=env, start_new_session=True, **pipes) as process:
        try:
            out, err = process.communicate(timeout=150)
        finally:
            if process.poll() is None:  # the launcher does not take its ranks with it
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def _free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def test_the_deepspeed_command_trains_on_two_ranks(data, tmp_path):
    values = _values(tmp_path, data, "real", train__steps=2, train__zero_stage=2)
    values["method"] = {"name": "classifier", "backbone": {"name": "vit_tiny_patch16_224", "weights": None}}
    values["data"] = {**data["data"], "crop": 32}
    values["eval"]["size"] = 32
    values["optim"]["warmup_steps"] = 0
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    done = _command(
        "deepspeed",
        "--num_gpus",
        "2",
        "--master_port",
        _free_port(),
        "launch/train.py",
        "--config",
        str(tmp_path / "a.yaml"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "val" in json.loads((tmp_path / "real/result.json").read_text())["splits"]
    assert json.loads((tmp_path / "real/environment.json").read_text())["world_size"] == 2
    assert "step 2/2  loss" in done.stdout


def test_mistakes_on_the_command_line_are_one_line_and_exit_2(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.yaml").write_text("run: {name: x}")
    missing = ["launch/train.py", "--config", str(tmp_path / "none.yaml")]
    unknown = ["launch/train.py", "--config", str(tmp_path / "a.yaml"), "--deepspeed", "--local_rank=0"]
    # the exit status of the process is shown by one of them: each costs the imports
    monkeypatch.setattr(sys, "argv", missing)
    status = runpy.run_path(str(ROOT / missing[0]))["main"]()
    done = _command(sys.executable, *unknown)
    for code, error, message in (
        (status, capsys.readouterr().err, "error: config: no file"),
        (done.returncode, done.stderr, "error: command line: --deepspeed is not known"),
    ):
        assert code == 2 and error.splitlines()[-1].startswith(message), error
        assert "Traceback" not in error
