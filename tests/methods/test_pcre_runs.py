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
