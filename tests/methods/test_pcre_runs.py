"""PCRE on engines: one rank against two, the evaluation threshold, and the published configs at full size."""

import json

import pytest
import torch

from tests.data.synthetic import write_synthetic_dataset
from tests.methods import pcre_runs
from tests.train.ranks import run_ranks
from tests.train.work import each
from wsss_dist.config import load_config
from wsss_dist.data.batch import Batch
from wsss_dist.methods import load_method
from wsss_dist.trainer import Trainer

SPLIT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def test_pcre_check_14_one_rank_in_chunks_has_the_gradient_and_the_prototypes_of_two_ranks(tmp_path):
    # four chunks: rank 0 holds 0 and 2, rank 1 holds 1 and 3; each image halves what the ones before it left
    config = pcre_runs.values(engine="plain", global_batch=8)
    config["method"]["cpe"] = {"momentum": 0.5}
    one, prototypes = run_ranks(1, tmp_path, pcre_runs.gradient, config, 12)[0]
    by_rank = run_ranks(1, tmp_path, pcre_runs.gradient, config, 12, [0, 2, 1, 3])[0][1]
    assert (torch.tensor(by_rank) - torch.tensor(prototypes)).abs().max() > 1e-3  # the order matters
    for two, moved in run_ranks(2, tmp_path, pcre_runs.gradient, config, 12):
        assert one.keys() == two.keys()
        for name, values in one.items():
            # the same four chunks, summed in another order
            torch.testing.assert_close(torch.tensor(two[name]), torch.tensor(values), rtol=1e-4, atol=1e-7, msg=name)
        # the tokens are equal bits, taken in the same order
        torch.testing.assert_close(torch.tensor(moved), torch.tensor(prototypes), rtol=0, atol=1e-6)


def smallest(**train):
    """A 2 x 2 grid and few layers, but every part of the method."""
    config = pcre_runs.values(**train)
    config["data"]["crop"] = 32
    config["method"]["backbone"] = {**config["method"]["backbone"], "depth": 3}
    config["method"] |= {"cam": {"scales": [1.0]}, "seg_dilations": [1, 2]}
    config["method"]["crme"] |= {"query_grid": 2, "layers": 1}
    return config


@pytest.fixture(scope="module")
def one_plain_rank(tmp_path_factory):
    """All 20 steps: prototypes move from step 2 on, the gate opens behind it, at step 8 the CRME masks come in."""
    metrics, _ = run_ranks(1, tmp_path_factory.mktemp("one"), pcre_runs.train, smallest(engine="plain"), 0, 20)[0]
    assert "loss_seg" not in metrics[2] and "loss_seg" in metrics[3] and metrics[-1]["radius"] == 5
    return [m["loss"] for m in metrics]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_ranks_follow_one_through_every_phase(zero, one_plain_rank, tmp_path):
    config = smallest(zero_stage=zero)
    if zero == 3:
        config["deepspeed"] = SPLIT
    first, second = run_ranks(2, tmp_path, pcre_runs.train, config, 0, 20)
    assert first == second, "the ranks ended with different losses or weights"
    off = max(abs(m["loss"] - one) / one for one, m in zip(one_plain_rank, first[0], strict=True))
    print(f"ZeRO {zero}: largest relative difference of the loss over 20 steps {off:.1e}")
    assert off < 1e-5  # float32 sums in another order


@pytest.mark.parametrize("train", [{"engine": "plain"}, {"zero_stage": 0}, {"zero_stage": 2}])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(train, tmp_path):
    # steps 8 to 11 of 20: every loss is on, the CRME masks are mixed in and the prototypes move
    whole, (metrics, digest, same) = run_ranks(
        1, tmp_path, pcre_runs.both, pcre_runs.values(**train), tmp_path, 8, 10, 12
    )[0]
    assert same and metrics == whole[0] and digest == whole[1]
    assert {"loss_seg", "loss_reg", "loss_cpe", "refine_inside"} <= set(metrics[0])


RECOMPUTED = [{"engine": "plain"}, {"zero_stage": 1, "precision": "bf16"}, {"zero_stage": 3}]


@pytest.mark.parametrize("train", [*RECOMPUTED, {"zero_stage": 3, "precision": "bf16"}])
def test_recomputed_blocks_change_no_bit_of_a_run(train, tmp_path):
    cases = []
    for recompute in (False, True):
        config = smallest(**train)
        config["method"]["backbone"]["recompute"] = recompute
        config["deepspeed"] = SPLIT if train.get("zero_stage") == 3 else {}
        cases.append(config)
    plain, again = run_ranks(1, tmp_path, each, pcre_runs.train, cases, 7, 10)[0]
    assert plain == again


def test_pcre_check_9_beta_changes_the_evaluation_and_leaves_training_bitwise_unchanged(tmp_path):
    root = write_synthetic_dataset(tmp_path / "data", 4, 2, 64, 3, 0)
    weights, steps, scores = [], [], []
    for beta in (0.2, 0.8):
        config = pcre_runs.values(engine="plain", steps=3, eval_every=1, log_every=1)
        config["run"] |= {"dir": str(tmp_path), "name": f"beta{beta}"}
        config["data"] |= {"format": "coco", "root": str(root), "eval_splits": ["val"]}
        config["optim"]["warmup_steps"] = 1
        config["eval"] |= {"beta": beta, "size": 64, "cam_scales": [1.0], "seg_scales": [1.0]}
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        assert Trainer(load_config(path, [])).train() == 0
        run = tmp_path / f"beta{beta}"
        manifest = json.loads((run / "checkpoints" / "ckpt-3" / "manifest.json").read_text())
        weights.append(manifest["files"]["model.safetensors"]["sha256"])
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps.append([line for line in lines if "eval" not in line])
        scores.append([line["eval"] for line in lines if "eval" in line])
    assert weights[0] == weights[1]
    assert [line["step"] for line in steps[0]] == [1, 2, 3] and steps[0] == steps[1]
    assert len(scores[0]) == len(scores[1]) >= 3
    for low, high in zip(*scores, strict=True):
        assert low["cam"] != high["cam"]  # the threshold arrived
        assert low["seg"] == high["seg"]


def dig(cfg, path):
    for name in path.split("."):
        cfg = getattr(cfg, name)
    return cfg


PUBLISHED = {
    "method.backbone.name": "vit_base_patch16_224.orig_in21k_ft_in1k",
    "method.backbone.weights": "timm",
    "method.backbone.last_block": "value_only",
    "method.backbone.frozen_blocks": 0,
    "method.backbone.aux_norm": False,
    "method.pool": "max",
    "method.seg_dilations": [6, 12, 18, 24],
    "method.cam.scales": [1.0, 0.5, 0.75, 1.5],
    "method.cam.high": 0.7,
    "method.cam.low": 0.25,
    "method.cam.proto_low": 0.25,
    "method.cam.mix": 0.3,
    "method.cam.mix_from": 0.4,
    "method.par.dilations": (1, 2, 4, 8, 12, 24),
    "method.par.iterations": 10,
    "method.par.downscale": 2,
    "method.crme.tau": 0.7,
    "method.crme.overlap": (0.3, 0.5),
    "method.crme.max_seeds": 5,
    "method.crme.top": 300,
    "method.crme.layers": 2,
    "method.crme.heads": 8,
    "method.crme.ffn": 2048,
    "method.crme.query_grid": 28,
    "method.crme.ignore_as_negative": True,
    "method.crme.radius.start": 1,
    "method.crme.radius.end": 5,
    "method.crme.radius.begin": 0.1,
    "method.crme.radius.finish": 0.4,
    "method.cpe.momentum": 0.99,
    "method.cpe.start": 0.1,
    "method.cpe.normalize_token": False,
    "method.loss.aux": 1.0,
    "method.loss.conf": 1.0,
    "method.loss.refine": 2.0,
    "method.loss.cpe": 0.02,
    "method.loss.seg": 0.12,
    "method.loss.reg": 0.05,
    "method.loss.contrast_from": 0,
    "method.loss.conf_from": 0,
    "method.loss.gate_from": 0.1,
    "method.loss.energy_sigma_rgb": 15,
    "method.loss.energy_sigma_xy": 100,
    "method.loss.energy_scale_factor": 0.5,
    "method.loss.energy_scale": "lattice",
    "method.head_lr_mult": 10,
    "method.seg_lr_mult": 10,
    "method.crme_lr_mult": 1,
    "method.token_lr_mult": 1,
    "optim.name": "adamw",
    "optim.betas": (0.9, 0.999),
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.01,
    "optim.schedule": "poly",
    "optim.power": 0.9,
    "optim.warmup_steps": 1500,
    "train.micro_batch": 2,
    "train.precision": "fp32",
    "train.grad_clip": None,
    "run.seed": 0,
    "data.crop": 448,
    "data.scale": (0.5, 2.0),
    "data.flip": True,
    "data.augment": "crop",
    "eval.cam_scales": [1.0, 0.5, 0.75, 1.5],
    "eval.seg_scales": [1.0, 1.25, 1.5],
    "eval.beta": 0.5,
    "eval.crf.iterations": 10,
    "eval.crf.bilateral": (140, 1, 7),
}
VOC = {
    "method.cam.proto_high": 0.7,
    "method.crme.radius.after": "hold",
    "method.loss.ptc": 0.3,
    "optim.lr": 3e-5,
    "optim.warmup_ratio": 1e-6,
    "train.steps": 20_000,
    "train.global_batch": 4,
    "data.format": "voc",
    "data.train_split": "train_aug",
    "data.photometric": True,
    "data.untagged": "keep",
    "eval.size": 448,
    "eval.fuse": "voc",
    "eval.crf.spatial": (2, 1),
}
COCO = {
    "method.cam.proto_high": 0.9,
    "method.crme.radius.after": "off",
    "method.loss.ptc": 0.2,
    "optim.lr": 6e-5,
    "optim.warmup_ratio": 7e-7,
    "train.steps": 80_000,
    "train.global_batch": 8,
    "data.format": "coco",
    "data.train_split": "train2014",
    "data.photometric": False,
    "data.untagged": "drop",
    "eval.size": None,
    "eval.fuse": "coco",
    "eval.crf.spatial": (1, 1),
}


@pytest.mark.parametrize(("name", "own"), [("voc_vit.yaml", VOC), ("coco_vit.yaml", COCO)])
def test_published_configs_hold_the_published_settings(name, own):
    cfg = load_config(name, [])
    expected = PUBLISHED | own
    assert {path: dig(cfg, path) for path in expected} == expected


@pytest.mark.parametrize(
    ("name", "classes", "part", "radius"),
    # the disc grows at 25 %; at 50 % the COCO settings have none, and the CRME masks are in the pseudo labels
    [("voc_vit.yaml", 20, 0.25, 3.0), ("coco_vit.yaml", 80, 0.5, -1.0)],
)
def test_published_configs_train_one_full_size_step(name, classes, part, radius, monkeypatch):
    cfg = load_config(name, ["method.backbone.weights=null", "method.cam.scales=[1.0]"])  # one scale: time
    torch.manual_seed(0)
    method = load_method("pcre").Method(cfg.method, classes, cfg.train.steps)
    assert (method.backbone.depth, method.backbone.dim, method.backbone.aux_block) == (12, 768, 10)
    labels = torch.zeros(1, classes)
    labels[0, [1, classes - 1]] = 1
    box, flipped = torch.tensor([[0, 448, 0, 448]]), torch.zeros(1, dtype=torch.bool)
    batch = Batch(torch.randn(1, 3, 448, 448), labels, box, ["x"], flipped)
    stages, original = [], method._stage
    monkeypatch.setattr(method, "_stage", lambda *a, **k: stages.append(original(*a, **k)) or stages[-1])
    out = method(batch, int(part * cfg.train.steps))
    out["loss"].backward()
    assert torch.isfinite(out["loss"]) and out["radius"] == pytest.approx(radius)
    assert {"loss_seg", "loss_reg", "loss_cpe", "loss_refine", "loss_ptc", "loss_conf"} <= set(out)
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)
    if part >= 0.4:
        assert stages[0].masks.shape == (2, 448, 448) and stages[0].masks.amax() > 0.9  # min-max normalised
    else:
        assert stages[0].masks is None
