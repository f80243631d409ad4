"""Reading a config, and one clear sentence for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import wsss_dist.config
from tests.train import tiny
from wsss_dist.config import CONFIGS, check_world, load_config, parse_config, read_config
from wsss_dist.ds_config import ds_config
from wsss_dist.errors import UserError
from wsss_dist.methods import load_method
from wsss_dist.pipeline import Pipeline


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(wsss_dist.config, "load_method", lambda name: tiny if name == "tiny" else load_method(name))


def _write(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump(tiny.values(**changes)))
    return path


def test_overrides_yaml_floats_and_round_trip(tmp_path):
    text = yaml.safe_dump(tiny.values()).replace("lr: 0.001", "lr: 6e-5")
    (tmp_path / "a.yaml").write_text(text)
    cfg = load_config(
        tmp_path / "a.yaml", ["optim.eps=1e-7", "method.width=16", "train.eval_every=null", "data.scale=[1, 2]"]
    )
    assert cfg.optim.lr == 6e-5 and cfg.optim.eps == 1e-7, "YAML 1.1 reads 6e-5 as a word"
    assert cfg.method.width == 16 and cfg.method_name == "tiny" and cfg.data.scale == (1, 2)
    assert cfg.run_dir == Path("runs/tiny")
    (tmp_path / "b.yaml").write_text(cfg.to_yaml())
    assert load_config(tmp_path / "b.yaml") == cfg


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_load_and_are_found_by_name(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = read_config(path.name)
    stages = Pipeline(values).entries.values() if "stages" in values else []
    runs = [e.config for e in stages if e.kind == "train"] or [parse_config(values)]
    for cfg in runs:
        assert parse_config(yaml.safe_load(cfg.to_yaml())) == cfg


def test_a_base_is_changed_key_by_key(tmp_path):
    _write(tmp_path / "a.yaml", optim__lr=0.5, optim__eps=1e-6)
    (tmp_path / "b.yaml").write_text(f"base: {tmp_path}/a.yaml\noptim: {{lr: 0.25}}\nrun: {{name: b}}\n")
    (tmp_path / "c.yaml").write_text(f"base: {tmp_path}/b.yaml\noptim: {{eps: 1.0e-5}}\n")
    first, last = load_config(tmp_path / "a.yaml"), load_config(tmp_path / "c.yaml", ["optim.weight_decay=0.5"])
    assert (last.optim.lr, last.optim.eps, last.optim.weight_decay, last.run.name) == (0.25, 1e-5, 0.5, "b")
    assert last.data == first.data and last.train == first.train


def test_bases_in_a_circle_or_missing(tmp_path):
    for name, other in (("a", "b"), ("b", "a"), ("c", "d")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {tmp_path}/{other}.yaml\n")
    with pytest.raises(UserError, match="b.yaml has the 'base' .*a.yaml, which leads back to it"):
        load_config(tmp_path / "a.yaml")
    with pytest.raises(UserError, match="no file '.*d.yaml'"):
        load_config(tmp_path / "c.yaml")


def test_a_key_may_override_one_of_an_anchor(tmp_path):
    (tmp_path / "b.yaml").write_text("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\n")
    assert read_config(tmp_path / "b.yaml")["y"] == {"a": 1, "b": 3}


MISTAKES = [
    ({"optim__lrr": 1}, [], r"unknown key 'optim.lrr' \(value 1\); did you mean 'lr'"),
    ({"method": {"name": "tiny", "widht": 3}}, [], r"unknown key 'method.widht'.*did you mean 'width'"),
    ({"method": {"name": "tinny"}}, [], r"'method.name' is 'tinny'; known methods: .*pcre"),
    ({"method": "tiny"}, [], r"'method' must be a mapping with a 'name'"),
    ({"trian": {}}, [], r"unknown key 'trian'.*did you mean 'train'"),
    ({"train__steps": 0}, [], r"'train.steps' is 0: .*greater than 0"),
    ({"train__precision": "fp16"}, [], r"'train.precision' is 'fp16': .*'fp32' or 'bf16'"),
    ({"train__zero_stage": 4}, [], r"'train.zero_stage' is 4"),
    ({"optim__lr": "fast"}, [], r"'optim.lr' is 'fast': .*number"),
    ({"run__name": "../x"}, [], r"'run.name' is '../x': must be a plain folder name"),
    ({"optim__warmup_steps": 20}, [], r"'optim.warmup_steps' is 20, .*below 'train.steps' \(20\)"),
    ({"train__micro_batch": 3}, [], r"'train.global_batch' \(8\) is no multiple of 'train.micro_batch' \(3\)"),
    ({"train__engine": "plain", "train__zero_stage": 1}, [], r"'train.zero_stage' is 1 but 'train.engine' is plain"),
    ({"train__eval_every": 5}, [], r"'train.eval_every' is 5 but 'data.eval_splits' is empty"),
    ({"deepspeed": {"train_batch_size": 4}}, [], r"'deepspeed.train_batch_size' is decided by train.global_batch"),
    (
        {"deepspeed": {"zero_optimization": {"stage": 2}}},
        [],
        r"zero_optimization.stage' is decided by train.zero_stage",
    ),
    ({"deepspeed": {"bf16": {"enabled": True}}}, [], r"'deepspeed.bf16' is decided by train.precision"),
    ({}, ["optim.lr"], r"--set 'optim.lr' must look like section.key=value"),
    ({}, ["run.name.x=1"], r"'run.name' is 'tiny', not a section"),
    ({}, ["optim.lr=[1"], r"--set optim.lr=\[1.*correct the YAML"),
    (
        {"train__steps": 0, "method": {"name": "tiny", "width": "x"}},
        [],
        r"(?s)'method.width' is 'x'.*'train.steps' is 0",
    ),
]


@pytest.mark.parametrize("changes, settings, message", MISTAKES, ids=lambda m: str(m)[:40])
def test_mistakes(changes, settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_config(_write(tmp_path / "a.yaml", **changes), settings)


@pytest.mark.parametrize(
    "text, message",
    [
        ("run: {name: a\ntrain: 3", r"a.yaml, line 2: .*correct the YAML"),
        ("run:\n  name: a\n  name: b", r"a.yaml, line 3: key 'name' is there twice"),
        ("- a", r"must hold sections"),
        ("run: {name: !!python/object/apply:os.system [ls]}", r"a.yaml, line 1: could not determine a constructor"),
        ("run: {name: a}", r"(?s)'method' is missing.*'data' is missing"),
    ],
)
def test_files_that_are_no_config(text, message, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "a.yaml")


def test_a_missing_file_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no file 'coco_vti.yaml'.*did you mean 'coco_vit.yaml'"):
        load_config("coco_vti.yaml")


def test_number_of_ranks():
    cfg = parse_config(tiny.values())
    check_world(cfg, 4)
    with pytest.raises(
        UserError, match=r"no multiple of 'train.micro_batch' \(2\) times 3 ranks; start 1 or 2 or 4 ranks"
    ):
        check_world(cfg, 3)


def test_deepspeed_config_is_derived_from_ours():
    cfg = parse_config(
        tiny.values(
            train__zero_stage=2, deepspeed={"zero_optimization": {"overlap_comm": False}, "wall_clock_breakdown": True}
        )
    )
    got = ds_config(cfg, 2)
    assert (got["train_batch_size"], got["train_micro_batch_size_per_gpu"], got["gradient_accumulation_steps"]) == (
        8,
        2,
        2,
    )
    assert got["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    assert got["gradient_clipping"] == 1.0 and got["bf16"] == {"enabled": False} and got["wall_clock_breakdown"] is True
    assert ds_config(cfg, 2) == got
