"""A small PCRE on a CUDA device: the ways to save time and memory against the plain one, and the engines against a CPU.

The bits of two runs need not be equal there: the backward pass of an upsampling adds with atomics.
"""

from __future__ import annotations

import pytest
import torch

from tests.methods import pcre_runs
from tests.methods.stage_runs import batch_of, values
from tests.methods.tiny import NUM_CLASSES, backbone_config
from tests.train.test_speed import PLAIN, small
from wsss_dist import dist
from wsss_dist.config import parse_config
from wsss_dist.engine import build_engine
from wsss_dist.methods import load_method
from wsss_dist.models.vit import ViT

pytestmark = pytest.mark.gpu
LATE = 10  # of 20 steps: every loss counts


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    """Convolutions in fp32, as on a CPU; nothing compiled before."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def losses_of(config: dict, first: int = LATE, steps: int = 2) -> list[float]:
    engine = pcre_runs.engine_of(config)
    return [m["loss"] for m in pcre_runs.steps_of(engine, config, first, first + steps)]


def on_a_cpu(config: dict, monkeypatch: pytest.MonkeyPatch, **given: int) -> list[float]:
    with monkeypatch.context() as patch:
        patch.setattr(dist, "device", lambda: torch.device("cpu"))
        return losses_of(config, **given)


def test_a_pack_of_scales_is_each_scale_by_itself():
    vit = ViT(backbone_config(depth=4), 3).cuda()
    views = [torch.randn(n, 3, h, w, device="cuda") for n, h, w in ((2, 32, 48), (4, 64, 64), (2, 48, 85))]
    with torch.no_grad():
        packed, single = vit(views), [vit(x) for x in views]
    for a, b in zip(packed, single, strict=True):
        for name in ("class_tokens", "patches", "aux"):  # fp32 sums in another order
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-4)


def test_channels_last_gives_the_losses_of_the_plain_layout():
    results = []
    for channels_last in (False, True):
        cfg = parse_config(
            values({"name": "classifier", "backbone": PLAIN}, engine="plain", channels_last=channels_last)
        )
        torch.manual_seed(1)
        engine = build_engine(load_method("classifier").Method(cfg.method, NUM_CLASSES, cfg.train.steps), cfg)
        results.append([engine.train_step([batch_of(step)], step)["loss"] for step in range(3)])
    assert results[1] == pytest.approx(results[0], rel=1e-4)


def test_compiled_blocks_give_the_losses_of_the_plain_ones():
    plain, compiled = (losses_of(small(engine="plain", compile=c), first=0) for c in (False, True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_recomputed_activations_give_the_losses_of_kept_ones():
    results = []
    for recompute in (False, True):
        config = pcre_runs.values(engine="plain")
        config["method"]["backbone"] = {**config["method"]["backbone"], "recompute": recompute}
        results.append(losses_of(config))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6), "the forward pass is the same"
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-4), "and so the gradient, but for atomics"


def test_a_plain_step_is_that_of_a_cpu(monkeypatch):
    config = pcre_runs.values(engine="plain")
    # fp32 sums in another order, and a few pixels at a threshold take another label
    assert losses_of(config) == pytest.approx(on_a_cpu(config, monkeypatch), rel=5e-3)


def test_a_step_of_deepspeed_in_bf16_is_near_that_of_a_cpu(monkeypatch):
    given = {"first": 0, "steps": 1}  # later the labels, which have thresholds, depend on the rounding
    want = on_a_cpu(pcre_runs.values(engine="plain"), monkeypatch, **given)
    got = losses_of(pcre_runs.values(engine="deepspeed", zero_stage=1, precision="bf16"), **given)
    assert got == pytest.approx(want, rel=3e-2)  # each rounding is up to 4e-3 off; the loss is a mean over many


@pytest.mark.parametrize("train", [{"engine": "plain"}, {"engine": "deepspeed", "zero_stage": 1, "precision": "bf16"}])
def test_a_run_goes_on_where_it_was(train, tmp_path):
    (whole, _), (resumed, _, same) = pcre_runs.both(pcre_runs.values(**train), tmp_path, LATE, LATE + 2, LATE + 4)
    assert same, "the prototypes come back bit for bit"
    rel = 3e-2 if "precision" in train else 1e-3
    assert [m["loss"] for m in resumed] == pytest.approx([m["loss"] for m in whole], rel=rel)
