"""The benchmark of training: what is timed as what, and when it refuses."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn

import kernels
from tests.data.synthetic import write_synthetic_dataset
from tests.methods.pcre_runs import batches as pcre_batches
from tests.methods.pcre_runs import engine_of
from tests.methods.pcre_runs import values as pcre_values
from tests.mistakes import status_of
from tests.train.ranks import run_ranks
from tests.train.work import benchmark, digest
from wsss_dist.benchmark import contest, figures, flops, show, synthetic
from wsss_dist.benchmark.phases import (
    BACKBONE,
    BACKWARD,
    CAM_BACKBONE,
    COMMUNICATION,
    HEADS,
    LABELS,
    LOADER,
    OPTIMISER,
    OTHER,
    Recorder,
    Watch,
    stopwatch,
)
from wsss_dist.config import parse_config
from wsss_dist.data import DataConfig
from wsss_dist.data.batch import Batch
from wsss_dist.data.config import MapConfig
from wsss_dist.errors import UserError
from wsss_dist.peers import operators
from wsss_dist.scaling.model import Work

CPU = torch.device("cpu")


def small(**changes) -> dict:
    """A PCRE run of one micro batch of two images; `train__engine` changes train.engine."""
    out = pcre_values(engine="plain", global_batch=2)
    out["data"]["classes"] = ["cat", "dog", "cow"]
    out["method"]["loss"] = {"reg": 0}
    for key, value in changes.items():
        section, name = key.split("__")
        out[section][name] = value
    return out


# ---- phases ----------------------------------------------------------------------------------------------------------


def test_time_belongs_to_the_innermost_phase_and_adds_up():
    readings = iter([0, 1, 3, 7, 15, 31, 63])
    recorder = Recorder(lambda: next(readings))
    recorder.start()
    recorder.push(HEADS)  # 1
    recorder.push(BACKBONE)  # 3
    recorder.pop()  # 7
    recorder.pop()  # 15
    recorder.push(BACKWARD)  # 31
    recorder.stop()  # 63
    totals = {k: v for k, v in recorder.totals().items() if v}
    assert totals == {OTHER: 1 + 16, HEADS: 2 + 8, BACKBONE: 4, BACKWARD: 32}


def test_watching_changes_nothing_that_is_trained_and_puts_everything_back():
    places = [
        (torch.no_grad, "__enter__"),
        (torch.no_grad, "__exit__"),
        (kernels, "par"),
        (Batch, "to"),
        (torch.distributed, "all_reduce"),
    ]
    before = [getattr(*place) for place in places]
    results = []
    for watched in (False, True):
        engine = engine_of(small())
        batches = pcre_batches(small(), 0)
        with Watch() as watch:
            if watched:
                watch.operators(kernels)
                watch.method(engine.module)
                watch.engine(engine)
                watch.recorder = stopwatch(CPU, "wall")
                watch.recorder.start()
            loss = engine.train_step(batches, 18)["loss"]
            if watched:
                watch.recorder.stop()
                totals = watch.recorder.totals()
        results.append((loss, digest(engine)))
    assert results[0] == results[1]
    assert all(totals[phase] > 0 for phase in (LOADER, HEADS, BACKBONE, CAM_BACKBONE, LABELS, BACKWARD, OPTIMISER))
    assert [getattr(*place) for place in places] == before
    assert not {"forward", "backward", "update"} & set(vars(engine)) and "after_step" not in vars(engine.module)


def test_what_runs_without_gradient_in_the_forward_pass_alone_is_told_apart():
    with Watch() as watch:
        recorder = watch.recorder = Recorder(lambda: 0.0)
        recorder.start()
        with watch.phase(HEADS):
            with torch.no_grad():
                assert recorder.phase == LABELS
                with torch.no_grad():
                    assert recorder.phase == LABELS
            assert recorder.phase == HEADS
        with watch.phase(OPTIMISER), torch.no_grad():
            assert recorder.phase == OPTIMISER


# ---- operations ------------------------------------------------------------------------------------------------------


def test_attention_on_the_cpu_is_counted():
    q, k, v = (torch.randn(2, 3, n, 16, requires_grad=True) for n in (10, 7, 7))
    with flops.counted() as counter:
        out = F.scaled_dot_product_attention(q, k, v)
        forward = counter.get_total_flops()
        out.sum().backward()
    product = 2 * (2 * 3) * 10 * 7 * 16
    assert forward == 2 * product
    assert counter.get_total_flops() == forward + 5 * product  # the scores once more, and four products


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_convolution_takes_twice_as_much_backward(groups, transposed):
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(8, 16, 3, stride=2, padding=1, groups=groups)
    x = torch.randn(2, 8, 10, 12, requires_grad=True)
    with flops.counted() as counter:
        out = layer(x)
        forward = counter.get_total_flops()
        out.sum().backward()
    places = 2 * (10 * 12 if transposed else 5 * 6)
    assert forward == 2 * places * 9 * 8 * 16 // groups
    assert counter.get_total_flops() == 3 * forward
    with flops.counted() as counter:
        layer(x.detach()).sum().backward()
    assert counter.get_total_flops() == 2 * forward, "the gradient of the images is not asked for"


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H200 NVL", "bf16", 835e12),
        ("NVIDIA H100 80GB HBM3", "fp32", 67e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
    ],
)
def test_peaks_of_known_devices(name, precision, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    got = flops.peak(torch.device("cuda"), precision, convolutions=False)
    assert got["flops_per_s"] == expected and "data sheet" in got["source"]


@pytest.mark.parametrize("name", ["NVIDIA H200 MIG 1g.18gb", "NVIDIA A10G", "Some Accelerator"])
def test_the_peak_of_an_unknown_device_is_measured(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(flops, "_measured", lambda *_: 7.0)
    got = flops.peak(torch.device("cuda"), "bf16", convolutions=False)
    assert got["flops_per_s"] == 7.0 and "measured" in got["source"]


def test_tf32_counts_where_torch_uses_it(monkeypatch):
    """The same for the share of the peak that is measured and for the hours that are modelled."""

    def kinds() -> list[str]:
        work = Work(flops=1e12, groups=((1,),), global_batch=1, micro_batch=1)
        modelled = [dataclasses.replace(work, convolutions=c).arithmetic for c in (False, True)]
        measured = [flops.peak(torch.device("cuda"), "fp32", convolutions=c)["kind"] for c in (False, True)]
        assert measured == modelled
        return measured

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert kinds() == ["fp32", "tf32"], "torch's defaults"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert kinds() == ["tf32", "fp32"]
    assert flops.peak(CPU, "fp32", convolutions=True)["kind"] == "fp32"


def test_the_benchmark_knows_what_its_method_mostly_is():
    config = small()
    assert not contest.Contest(parse_config(config), contest.Options()).convolutions
    config["method"] = {"name": "classifier", "backbone": {"name": "resnet18", "weights": None}}
    assert contest.Contest(parse_config(config), contest.Options()).convolutions


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_synthetic_batches_have_the_shapes_of_the_config():
    kinds = ("labels", "grey", "scores", "erased")
    cfg = DataConfig(format="coco", root="unused", crop=40, maps={k: MapConfig(dir="unused", kind=k) for k in kinds})
    batch = synthetic.make_batch(cfg, synthetic.num_classes(cfg), 3, seed=5)
    assert batch.images.shape == (3, 3, 40, 40) and batch.labels.shape == (3, 80) and len(batch) == 3
    assert batch.labels.sum(1).min() >= 1 and batch.boxes.tolist() == [[0, 40, 0, 40]] * 3
    dtypes = [batch.maps[k].dtype for k in kinds]
    assert dtypes == [torch.uint8, torch.float32, torch.float32, torch.uint8]
    assert set(batch.maps["labels"][0].unique().tolist()) <= {0, int(batch.labels[0].argmax()) + 1, 255}
    again = synthetic.make_batch(cfg, 80, 3, seed=5)
    assert torch.equal(batch.images, again.images) and torch.equal(batch.labels, again.labels)


def test_a_folder_has_no_number_of_classes():
    assert synthetic.num_classes(DataConfig(format="folder", root="x", classes=["a", "b"])) == 2
    with pytest.raises(UserError, match="data.classes, or give --data"):
        synthetic.num_classes(DataConfig(format="folder", root="x"))


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch):
    original = operators.patch_token_contrast
    monkeypatch.setattr(operators, "patch_token_contrast", lambda *a: 1.01 * original(*a))
    with pytest.raises(UserError, match="the peer is off by"):
        benchmark(small(), steps=1, warmup=0, peer=True)


def test_the_command_prints_writes_and_draws(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.yaml").write_text(json.dumps(small()))
    files = ["--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"]
    arguments = ["--config", tmp_path / "run.yaml", "--steps", 1, "--warmup", 0, "--peer", *files]
    assert status_of("benchmark", arguments, monkeypatch) == 0
    said, result = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "peer / ours: time" in said and "MFU" in said and "region selection" in said
    for row in result["rows"].values():
        assert {LOADER, BACKBONE, HEADS, CAM_BACKBONE, LABELS, "PAR", BACKWARD, OPTIMISER} <= set(row["phases_s"])
        assert row["phases_over_step"] == pytest.approx(1, abs=0.03)
        assert 0 < row["mfu"] and row["runs"] == 1 and row["step_min_s"] <= row["step_median_s"]
        assert row["images_per_s"] == pytest.approx(2 / row["step_median_s"])
        assert row["flops"][CAM_BACKBONE] > 0.3 * row["flops"][BACKBONE]
    assert result["peer_off_by"]["gradient"] < 1e-4 and result["ratio"]["median"] > 0


def test_own_data_is_loaded_and_a_single_contestant_tells_its_peak(tmp_path):
    write_synthetic_dataset(tmp_path / "data", 6, 2, 64, 3, seed=0)
    values = small(data__format="coco", data__root=str(tmp_path / "data"), data__classes=None)
    result = benchmark(values, steps=1, warmup=0, data=True)
    assert result["shape"]["classes"] == 3 and result["data"] == "own" and list(result["rows"]) == ["ours"]
    assert result["rows"]["ours"]["phases_s"][LOADER] > 0 and result["peak_mib"] >= 0


def test_batches_that_were_loaded_before_the_first_step_are_not_timed():
    values = small(data__num_workers=3, train__global_batch=4)  # 2 micro batches a step, 12 of them loaded ahead
    cfg = parse_config(values)
    assert contest._warmup(cfg, contest.Options(), 2) == 2
    assert contest._warmup(cfg, contest.Options(data=True), 2) == 5
    assert contest._warmup(cfg, contest.Options(data=True, warmup=7), 2) == 7
    with pytest.raises(UserError, match="--warmup is 4, but 3 workers load 12 micro batches.*give --warmup 5"):
        contest._warmup(cfg, contest.Options(data=True, warmup=4), 2)
    assert contest._warmup(cfg, contest.Options(warmup=0), 2) == 0


def test_a_step_takes_as_long_as_on_its_slowest_rank(monkeypatch):
    monkeypatch.setattr(figures.dist, "all_gather_object", lambda own: [own, [2.0, 9.0, 4.0]])
    player = contest.Contestant(None, plain=[6.0, 3.0, 5.0], watched=[3.0], phases=[{"backbone": 3.0}])
    row = figures._row(player, images=4, num_micro=1)
    assert (row["step_min_s"], row["step_median_s"], row["images_per_s"]) == (5.0, 6.0, 4 / 6)


@pytest.mark.parametrize(("compiled", "said"), [(True, ", not compiled and in the plain layout,"), (False, "")])
def test_the_memory_is_said_to_be_that_of_the_method_as_written(compiled, said):
    config = small(train__compile=compiled)
    config["method"] |= {"crme": None, "cpe": None, "cam": {"scales": [1.0]}, "seg_dilations": [1]}
    done = contest.Contest(parse_config(config), contest.Options(warmup=0))
    done.contestants["ours"] = contest.Contestant(None, 2**20, {"backbone": 1.0}, [1.0], [1.0], [{"backbone": 1.0}])
    assert f"forward and backward{said} peak at 1 MiB" in "\n".join(show.lines(figures.figures(done, None)))


@pytest.mark.gpu
def test_phases_add_up_on_a_gpu():
    row = benchmark(small(), steps=3, warmup=2)["rows"]["ours"]
    assert row["phases_over_step"] == pytest.approx(1, abs=0.05)
    assert all(row["phases_s"][phase] > 0 for phase in (BACKBONE, HEADS, CAM_BACKBONE, "PAR", BACKWARD, OPTIMISER))
    assert row["flops"][BACKWARD] > row["flops"][BACKBONE]


def test_communication_is_told_apart_on_two_ranks(tmp_path):
    for result in run_ranks(2, tmp_path, partial(benchmark, steps=1, warmup=0), small(train__global_batch=4)):
        row = result["rows"]["ours"]
        assert row["phases_s"][COMMUNICATION] > 0 and result["shape"]["ranks"] == 2
        assert row["images_per_s"] == pytest.approx(4 / row["step_median_s"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "voc_pnoc.yaml"], "--stage is missing; voc_pnoc.yaml trains in the stages classifier, "),
        (["--config", "voc_pnoc.yaml", "--stage", "cams"], "--stage is cams; .* give --stage with one"),
        (["--config", "coco_vit.yaml", "--stage", "cams"], "has no 'stages'; leave --stage out"),
        (["--config", "NO_METHOD"], "neither 'method' nor 'stages'.*; add a method"),
        (["--config", "coco_vit.yaml", "--device", "tpu"], "--device is tpu; expected cpu or cuda"),
        (["--config", "coco_vit.yaml", "--steps", "0"], "--steps is 0; expected 1 or more"),
        (["--config", "coco_vit.yaml", "--plot", "a.pdf"], "--plot is a.pdf; expected a file that ends in .png"),
        (["--config", "quickstart_classifier.yaml", "--peer"], "method 'classifier' has none, only pcre"),
        (["--config", "quickstart.yaml", "--peer"], "'method.backbone.frozen_blocks'.* set it to 0"),
        (["--config", "coco_vit.yaml", "--peer", "--data"], "--peer and --data exclude each other"),
        (["--config", "coco_vit.yaml", "--peer", "--set", "train.precision=bf16"], "--set train.precision=fp32"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "none.yaml").write_text("run: {name: x}\n")
    arguments = [tmp_path / "none.yaml" if a == "NO_METHOD" else a for a in arguments]
    assert status_of("benchmark", arguments, monkeypatch) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said
    with pytest.raises(UserError, match=message):
        raise UserError(said)


def test_a_cuda_device_that_is_not_there_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert status_of("benchmark", ["--config", "coco_vit.yaml", "--device", "cuda"], monkeypatch) == 2
    assert "there is no CUDA device" in capsys.readouterr().err


def test_random_weights_reach_every_backbone():
    cfg = parse_config(small(method__backbone={"name": "vit_tiny_patch16_224", "weights": "timm"}))
    assert contest.random_weights(cfg.method).backbone.weights is None
