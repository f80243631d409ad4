"""The single-network stages of P-NOC: C2AM-H, AffinityNet, PoolNet and DeepLabV3+."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kernels
from tests.methods.stage_runs import BACKBONE, values
from tests.methods.tiny import NUM_CLASSES, random_batch
from wsss_dist.config import parse_config
from wsss_dist.errors import UserError
from wsss_dist.methods import load_method
from wsss_dist.methods.base import Views
from wsss_dist.methods.c2am import HintConfig, hint_loss

FROZEN = {**BACKBONE, "frozen_stages": 5}


def make(name, **config):
    torch.manual_seed(0)
    module = load_method(name)
    return module.Method(module.Config.model_validate(config), NUM_CLASSES, 20).train()


def step(method, batch):
    out = method.training_step(batch, 0)
    out["loss"].backward()
    return out


# ---------------------------------------------------------------------------------------------------- C2AM-H


def hint(*rows):
    """[1, 2, 2] hint, to be read on a grid of the same size."""
    return torch.tensor([rows])


def test_hint_loss_by_hand():
    logits = torch.tensor([[[[0.0, 2.0], [-1.0, 5.0]]]])
    cfg = HintConfig(threshold=0.4, label_smoothing=0.1)
    got = hint_loss(logits, hint([0.4, 0.39], [0.9, 0.0]), cfg)
    # the places with 0 and -1, target .95: -.95 ln s(x) - .05 ln(1 - s(x))
    want = (0.6931472 + (0.95 * 1.3132617 + 0.05 * 0.3132617)) / 2
    assert got.item() == pytest.approx(want, rel=1e-6)


def test_an_empty_hint_set_gives_zero_and_no_gradient():
    logits = torch.randn(1, 1, 2, 2, requires_grad=True)
    loss = hint_loss(logits, hint([0.1, 0.2], [0.3, 0.0]), HintConfig())
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_c2am_adds_its_terms_up():
    batch = random_batch(side=96)
    batch.maps["hint"] = torch.rand(4, 96, 96)
    method = make("c2am", backbone=BACKBONE, hint={"weight": 0.5})
    out = step(method, batch)
    total = out["loss_foreground"] + out["loss_background"] + out["loss_push"] + 0.5 * out["loss_hint"]
    assert out["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    plain = make("c2am", backbone=BACKBONE, hint=None)
    assert set(plain.training_step(random_batch(side=96), 0)) == set(out) - {"loss_hint"}


def test_c2am_contrasts_vectors_of_features_by_the_sigmoid_of_its_map():
    method, batch = make("c2am", backbone=BACKBONE, hint=None), random_batch(side=96)
    method.eval()
    taps = method.backbone(batch.images)
    features, logits = method.head(*taps[3:])
    share = logits.sigmoid()
    want = kernels.c2am_contrast((share * features).mean((2, 3)), ((1 - share) * features).mean((2, 3)))
    out = method.training_step(batch, 0)
    for name, value in zip(("loss_foreground", "loss_background", "loss_push"), want, strict=True):
        torch.testing.assert_close(out[name], value.detach(), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- AffinityNet


def test_affinity_is_the_path_loss_of_its_edges_and_trains_the_head_alone():
    batch = random_batch(side=96)
    batch.maps["labels"] = torch.randint(0, 3, (4, 12, 12)).repeat_interleave(8, 1).repeat_interleave(8, 2).byte()
    method = make("affinity", backbone=FROZEN, radius=5)
    out = step(method, batch)
    # the labels are constant in blocks of 8, so the nearest pixel of each cell of 4 is any of them
    small = batch.maps["labels"][:, ::4, ::4].long()
    want = kernels.path_affinity_loss(method.edges(batch.images), small, radius=5)
    assert out["loss"].item() == pytest.approx(want.item(), rel=1e-6)
    assert all(p.grad is not None for p in method.head.parameters())
    assert not any(p.requires_grad for p in method.backbone.parameters())


# ---------------------------------------------------------------------------------------------------- PoolNet


def test_poolnet_sums_over_the_pixels_of_an_image():
    batch = random_batch(side=64)
    batch.maps["saliency"] = torch.rand(4, 64, 64)
    method = make("poolnet", backbone={"name": "resnet18", "weights": None}, divisor=10.0)
    out = step(method, batch)
    logits = method.saliency(batch.images)[:, 0]
    want = sum(F.binary_cross_entropy_with_logits(x, y) for x, y in zip(logits, batch.maps["saliency"], strict=True))
    assert out["loss"].item() == pytest.approx((want * 64 * 64 / 10 / 4).item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------- DeepLabV3+


def labelled(fill=None):
    batch = random_batch(side=64)
    batch.maps["labels"] = torch.randint(0, NUM_CLASSES + 1, (4, 64, 64), generator=torch.Generator().manual_seed(0))
    batch.maps["labels"][:, :, 40:] = 255
    if fill is not None:
        batch.maps["labels"].fill_(fill)
    batch.maps["labels"] = batch.maps["labels"].byte()
    return batch


def test_deeplab_smooths_over_all_classes_and_leaves_255_out():
    method, batch = make("deeplab", backbone=BACKBONE, label_smoothing=0.1).eval(), labelled()
    out, k = step(method, batch), NUM_CLASSES + 1
    logs = method.logits(batch.images, (64, 64)).log_softmax(1)
    labels = batch.maps["labels"].long()
    valid = labels != 255
    target = 0.9 * F.one_hot(labels.where(valid, 0), k).permute(0, 3, 1, 2) + 0.1 / k
    want = -((target * logs).sum(1) * valid).sum() / valid.sum()
    assert out["loss"].item() == pytest.approx(want.item(), rel=1e-5)


def test_deeplab_without_a_labelled_pixel_has_loss_zero():
    method = make("deeplab", backbone=BACKBONE)
    out = step(method, labelled(fill=255))
    assert out["loss"].item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in method.parameters() if p.grad is not None)


def test_deeplab_predicts_the_same_of_a_mirrored_image():
    method, batch = make("deeplab", backbone=BACKBONE).eval(), random_batch(side=64)
    views = Views(seg_scales=[1.0, 0.5])
    got = method.predict(batch, views)
    assert got.logits.shape == got.single.shape == (4, NUM_CLASSES + 1, 64, 64)
    assert got.cam is None
    batch.images = batch.images.flip(-1)
    mirrored = method.predict(batch, views)
    torch.testing.assert_close(mirrored.logits.flip(-1), got.logits, rtol=1e-4, atol=1e-4)
    assert (mirrored.single.flip(-1) - got.single).abs().max() > 1e-3, "one view alone is not symmetric"


# ---------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("name, needs", [("c2am", "hint"), ("affinity", "labels"), ("deeplab", "labels")])
def test_the_map_of_the_stage_before_is_asked_for(name, needs):
    own = {"backbone": FROZEN, "radius": 5} if name == "affinity" else {"backbone": BACKBONE}
    config = values({"name": name, **own})
    parse_config(config)
    del config["data"]["maps"][needs]
    with pytest.raises(UserError, match=f"method '{name}' is trained on the map '{needs}'.*add data.maps.{needs}"):
        parse_config(config)


def test_what_predicts_no_classes_is_not_evaluated():
    config = values({"name": "c2am", "backbone": BACKBONE})
    config["data"]["eval_splits"] = ["val"]
    with pytest.raises(UserError, match="'c2am' predicts no classes.*set data.eval_splits: \\[\\]"):
        parse_config(config)


def test_the_backbone_of_the_affinity_network_is_frozen():
    with pytest.raises(UserError, match="'method.backbone.frozen_stages' must be 5"):
        parse_config(values({"name": "affinity", "backbone": BACKBONE}))


@pytest.mark.parametrize("crop", [88, 100])
def test_tiles_must_lie_on_the_grid(crop):
    config = values({"name": "pnoc", "variant": "puzzle", "backbone": BACKBONE})
    config["data"]["crop"] = crop
    with pytest.raises(UserError, match=f"'data.crop' is {crop}.*set it to a multiple of 32"):
        parse_config(config)
