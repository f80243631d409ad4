"""PCRE on engines: one rank against two, the evaluation threshold, and the published configs at full size."""

import json

import pytest
import torch

from tests.methods import pcre_runs
from tests.train.ranks import run_ranks
from wsss_dist.config import load_config
from wsss_dist.data.synthetic import write_synthetic_dataset
from wsss_dist.trainer import Trainer

SPLIT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def test_pcre_check_14_one_rank_in_chunks_has_the_gradient_of_two_ranks(tmp_path):
    config = pcre_runs.values(engine="plain")
    one, prototypes = run_ranks(1, tmp_path, pcre_runs.gradient, config, 12)[0]
    for two, moved in run_ranks(2, tmp_path, pcre_runs.gradient, config, 12):
        assert one.keys() == two.keys()
        for name, values in one.items():
            # the same two chunks, summed in another order
            torch.testing.assert_close(torch.tensor(two[name]), torch.tensor(values), rtol=1e-4, atol=1e-7, msg=name)
        # the order of the moving average is that of the global batch: rank 0's images first; the tokens are equal bits
        torch.testing.assert_close(torch.tensor(moved), torch.tensor(prototypes), rtol=0, atol=1e-6)


@pytest.mark.parametrize("zero", [0, 3])
def test_two_ranks_follow_one_through_every_phase(zero, tmp_path):
    config = pcre_runs.values(zero_stage=zero)
    if zero == 3:
        config["deepspeed"] = SPLIT
    # steps 6 to 13 of 20: the losses behind the gate are on, at step 8 the CRME masks come in
    one = run_ranks(1, tmp_path, pcre_runs.train, config, 6, 14)[0]
    two = run_ranks(2, tmp_path, pcre_runs.train, config, 6, 14)
    assert two[0] == two[1], "the ranks ended with different losses or weights"
    assert two[0][0] == pytest.approx(one[0], rel=1e-5)  # float32 sums in another order, over 8 steps


def test_pcre_check_9_beta_leaves_training_bitwise_unchanged(tmp_path):
    root = write_synthetic_dataset(tmp_path / "data", 4, 2, 64, 3, 0)
    hashes = []
    for beta in (0.5, 0.45):
        config = pcre_runs.values(engine="plain", steps=3)
        config["run"] |= {"dir": str(tmp_path), "name": f"beta{beta}"}
        config["data"] = {"format": "coco", "root": str(root), "crop": 64, "num_workers": 0}
        config["optim"]["warmup_steps"] = 1
        config["eval"] |= {"beta": beta}
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        assert Trainer(load_config(path, [])).train() == 0
        manifest = json.loads((tmp_path / f"beta{beta}" / "checkpoints" / "ckpt-3" / "manifest.json").read_text())
        hashes.append([f["sha256"] for f in manifest["files"] if f["path"].endswith("model.safetensors")])
    assert hashes[0] and hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("name", "classes", "lr", "weights"),
    [
        ("voc_vit.yaml", 20, 3e-5, {"ptc": 0.3, "conf": 1.0, "refine": 2.0, "cpe": 0.02, "seg": 0.12, "reg": 0.05}),
        ("coco_vit.yaml", 80, 6e-5, {"ptc": 0.2, "conf": 1.0, "refine": 2.0, "cpe": 0.02, "seg": 0.12, "reg": 0.05}),
    ],
)
def test_published_configs_load_and_train_one_full_size_step(name, classes, lr, weights, tmp_path, monkeypatch):
    cfg = load_config(name, ["method.backbone.weights=null", "train.engine=plain", "train.micro_batch=1"])
    assert cfg.optim.lr == lr and weights.items() <= cfg.method.loss.model_dump().items()
    assert cfg.method.backbone.name.startswith("vit_base_patch16_224") and cfg.data.crop == 448
    from wsss_dist.data.batch import Batch
    from wsss_dist.methods import load_method

    torch.manual_seed(0)
    method = load_method("pcre").Method(cfg.method, classes, cfg.train.steps)
    assert method.backbone.depth == 12 and method.backbone.dim == 768
    labels = torch.zeros(1, classes)
    labels[0, [1, classes - 1]] = 1
    batch = Batch(
        torch.randn(1, 3, 448, 448), labels, torch.tensor([[0, 448, 0, 448]]), ["x"], torch.zeros(1, dtype=torch.bool)
    )
    # every loss is on past 10 % of the run; the multi-scale pass is cut to one scale to keep the test short
    cam = method.cfg.cam.model_copy(update={"scales": [1.0]})
    monkeypatch.setattr(method, "cfg", method.cfg.model_copy(update={"cam": cam}))
    before = method.decoder.branches[0].weight.clone()
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-4)
    out = method(batch, cfg.train.steps // 5)
    out["loss"].backward()
    optimizer.step()
    assert torch.isfinite(out["loss"]) and {"loss_seg", "loss_reg", "loss_cpe", "loss_refine"} <= set(out)
    assert not torch.equal(before, method.decoder.branches[0].weight)
