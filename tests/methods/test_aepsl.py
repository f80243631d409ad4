"""AE-PSL against the numbers and formulas of its specification: losses, weights of classes, erasing, mask assembly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.methods.tiny import NUM_CLASSES, random_batch
from wsss_dist.config import parse_config
from wsss_dist.data import DataConfig
from wsss_dist.data.erased import fill_erased
from wsss_dist.data.transforms import MEAN, STD
from wsss_dist.errors import UserError
from wsss_dist.losses import squared_softmax_loss
from wsss_dist.methods import load_method
from wsss_dist.methods.aepsl import Config, Method, at_corners, from_corners
from wsss_dist.methods.base import Views
from wsss_dist.models.trunk import Trunk, TrunkConfig
from wsss_dist.stages import region_masks, regions
from wsss_dist.stages.region_masks import assemble
from wsss_dist.stages.regions import select, stopping_rule

DATA = DataConfig(format="folder", root="unused")
RESNET = {"name": "resnet18", "weights": None, "norm": "fix", "output_stride": 16}
# golden check 3: four classes with background on a grid of 2 x 4
LOGITS = torch.tensor(
    [
        [[2, 0.5, -1, 0], [0, 1, 0.2, 0]],
        [[0.5, 2, 1, 0.3], [1, -0.9, 0.1, 2]],
        [[0, 1.8, 2, 0.5], [0.2, 0.3, 1.5, 0]],
        [[-1, 0, 0.1, 3.2], [0.4, 2.9, 0, 1.9]],
    ]
)


def method(variant="segmentation", **changes):
    torch.manual_seed(0)
    cfg = Config(variant=variant, backbone=TrunkConfig(**RESNET), **changes)
    return Method(cfg, NUM_CLASSES, 10)


def batch_with(labels):
    batch = random_batch(2, side=64, seed=1)
    batch.maps["labels"] = labels
    return batch


# --------------------------------------------------------------------------------------------------- losses


def test_squared_loss_golden():
    logits, labels = torch.tensor([[1.0, 2.0, -1.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    assert torch.allclose(logits.softmax(1), torch.tensor([[0.259496, 0.705385, 0.035119]]), atol=5e-7)
    assert squared_softmax_loss(logits, labels).item() == pytest.approx(0.1012581, abs=5e-8)


def test_squared_loss_gradient():
    """dL/dz_c = p_c (d_c - sum_k d_k p_k), d = 2 (p - q); an image without tags has none."""
    torch.manual_seed(0)
    logits = torch.randn(3, 5, dtype=torch.float32, requires_grad=True)
    labels = torch.tensor([[1.0, 0, 1, 0, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]])
    squared_softmax_loss(logits, labels).backward()
    p = logits.detach().softmax(1)
    d = 2 * (p - labels / labels.sum(1, keepdim=True).clamp_min(1))
    expected = p * (d - (d * p).sum(1, keepdim=True)) / 3
    expected[2] = 0
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-7)


def test_prohibition_golden():
    """Golden check 4: a class below 0.1 cannot win, one at 0.1 can; the others keep their score as weight."""
    network = method()
    for v, expected in (
        ((0.45, 0.47, 0.08), [[0, 1, 2, 0], [1, 0, 2, 1]]),
        ((0.45, 0.45, 0.10), [[0, 1, 2, 3], [1, 0, 2, 1]]),
    ):
        assert network.weighted(LOGITS[None], torch.tensor([v])).argmax(1)[0].tolist() == expected


def test_weighted_logits_are_the_log_of_weighted_probabilities():
    v = torch.tensor([[0.45, 0.25, 0.08]])
    g = LOGITS.softmax(0) * torch.tensor([1, 0.45, 0.25, 0]).view(4, 1, 1)
    torch.testing.assert_close(method().weighted(LOGITS[None], v).softmax(1)[0], g / g.sum(0), rtol=1e-5, atol=1e-7)
    assert torch.equal(method(prohibit_by="nothing").weighted(LOGITS[None], v)[0], LOGITS)


def test_prohibited_by_tags():
    """The bound +GT: [1, y] instead of the scores."""
    tags = torch.tensor([[1.0, 0.0, 1.0]])
    got = method(prohibit_by="tags").weighted(LOGITS[None], tags).argmax(1)[0]
    assert got.tolist() == [[0, 1, 1, 3], [1, 3, 0, 1]]


# --------------------------------------------------------------------------------------------- training step


def test_step_is_the_sum_of_its_three_terms():
    network = method(loss_size="grid").eval()
    torch.manual_seed(3)
    labels = torch.randint(0, NUM_CLASSES + 1, (2, 64, 64), dtype=torch.uint8)
    batch = batch_with(labels)
    out = network.training_step(batch, 0)
    features = network.backbone(batch.images)
    scores, f = network.head(features, True), network.segmenter(features).log_softmax(1)
    weights = torch.cat([torch.ones(2, 1), scores.softmax(1)], 1)
    online = (f.exp() * weights[:, :, None, None]).argmax(1)
    allowed = torch.cat([torch.ones(2, 1), batch.labels], 1).bool()
    total = squared_softmax_loss(scores, batch.labels)
    for mask in (labels[:, ::16, ::16].long(), online):
        for b in range(2):
            counted = [(y, x) for y in range(4) for x in range(4) if allowed[b, mask[b, y, x]]]
            total = total - sum(f[b, mask[b, y, x], y, x] for y, x in counted) / max(1, len(counted)) / 2
    torch.testing.assert_close(out["loss"], total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("psl", ["scores", "tags", "ones"])
def test_the_classifier_learns_from_its_tags_alone(psl):
    """Golden check 5: no gradient of J reaches the classifier's layer, whatever weights the classes."""
    network = method(psl=psl)
    batch = batch_with(torch.zeros(2, 64, 64, dtype=torch.uint8))
    loss = network.training_step(batch, 0)["loss"]
    features = network.backbone(batch.images).detach()
    own = squared_softmax_loss(network.head(features, True), batch.labels)
    expected = torch.autograd.grad(own, network.head.conv.weight)[0]
    got = torch.autograd.grad(loss, network.head.conv.weight)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


def test_an_image_without_labelled_pixel_trains_on_its_other_terms():
    """Golden check 6."""
    network = method(psl="off")
    labels = torch.full((2, 64, 64), 255, dtype=torch.uint8)
    out = network.training_step(batch_with(labels), 0)
    assert out["loss_mask"] == 0 and out["unlabelled_images"] == 1
    torch.testing.assert_close(out["loss"].detach(), out["loss_cls"])
    assert out["loss"].isfinite() and out["loss"] > 0
    labels[1] = 0
    assert network.training_step(batch_with(labels), 0)["unlabelled_images"] == 0.5


def test_warm_up_and_off_leave_the_online_term_out():
    batch = batch_with(torch.zeros(2, 64, 64, dtype=torch.uint8))
    terms = ("loss_cls", "loss_mask")
    late = method(psl_warmup=0.5)
    for network, step, with_online in ((late, 4, False), (late, 5, True), (method(psl="off"), 9, False)):
        out = network.eval().training_step(batch, step)
        expected = sum(out[t] for t in terms) + (out["loss_online"] if with_online else 0)
        torch.testing.assert_close(out["loss"].detach(), expected)


def test_labels_at_the_corners_of_the_grid():
    labels = torch.arange(321 * 321).view(1, 321, 321) % 251
    got = at_corners(labels.to(torch.uint8), 8, (41, 41))
    assert torch.equal(got[0].long(), labels[0, 0:321:8, 0:321:8])
    assert at_corners(labels.to(torch.uint8)[:, :64, :64], 16, (5, 4))[0, 4].tolist() == [255] * 4


@pytest.mark.parametrize(("stride", "size"), [(8, (321, 321)), (8, (64, 48)), (16, (33, 40))])
def test_predictions_lie_where_the_labels_of_the_loss_lay(stride, size):
    """A linear ramp over the image, picked at the corners and put back, is itself up to the last cell."""
    y, x = torch.meshgrid(*(torch.arange(float(s)) for s in size), indexing="ij")
    ramp = (3 * y + x)[None, None]
    picked = ramp[..., ::stride, ::stride]
    back = from_corners(picked, stride, size)
    inside = tuple((s - 1) // stride * stride + 1 for s in size)
    assert back.shape == ramp.shape
    torch.testing.assert_close(back[..., : inside[0], : inside[1]], ramp[..., : inside[0], : inside[1]])
    labels = torch.arange(size[0] * size[1]).view(1, *size) % 251
    assert torch.equal(
        at_corners(labels.to(torch.uint8), stride, picked.shape[2:]).long(), labels[:, ::stride, ::stride]
    )


def test_a_class_is_prohibited_by_the_mean_of_its_scores_over_all_views():
    """At 0.12 in one view and 0.10 in the mirror image it stays, at 0.11 and 0.07 it goes, for every pixel alike."""
    network, batch = method(loss_size="full").eval(), random_batch(2, side=64)
    for pair, kept in (((0.12, 0.10), True), ((0.11, 0.07), False)):
        v = torch.full((4, NUM_CLASSES), 0.5)
        v[:2, 1], v[2:, 1] = pair
        network._confidences = lambda scores, v=v: v
        logits = network.predict(batch, Views(fuse="mean")).logits
        assert bool((logits[:, 2] > -1e3).all()) is kept and (logits[:, [0, 1]] > -1e3).all()


def test_erasing_classifier_takes_part_in_nothing_but_tags():
    network = method("erasing", tag_loss="bce")
    assert network.segmenter is None and set(network.training_step(random_batch(2, side=64), 0)) == {"loss", "loss_cls"}
    maps = network.predict(random_batch(2, side=64), Views()).cam
    assert maps.shape == (2, NUM_CLASSES, 64, 64) and 0 <= maps.min() and maps.max() <= 1


def test_a_segmentation_without_masks_is_refused():
    with pytest.raises(UserError, match="'aepsl' is trained on the map 'labels'.*data.maps.labels"):
        parse_config(
            {
                "run": {"name": "x"},
                "data": {"format": "folder", "root": "unused"},
                "method": {"name": "aepsl", "variant": "segmentation"},
                "optim": {"lr": 1e-3, "warmup_steps": 0},
                "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
            }
        )


# --------------------------------------------------------------------------------------------------- erasing


def test_assembly_golden():
    """Golden check 1: all five rows of the truth table, on 8 x 8."""
    one, two = torch.zeros(2, 8, 8, dtype=torch.bool)
    one[:6, :4] = True  # class 3
    two[2:6, 2:8] = True  # class 7
    background = torch.zeros(8, 8, dtype=torch.bool)
    background[:, 3:] = True
    background[7] = False
    expected = [
        [4, 4, 4, 255, 0, 0, 0, 0],
        [4, 4, 4, 255, 0, 0, 0, 0],
        *[[4, 4, 255, 255, 255, 255, 255, 255]] * 4,
        [255, 255, 255, 0, 0, 0, 0, 0],
        [255] * 8,
    ]
    got = assemble(torch.tensor([3, 7]), torch.stack([one, two]), background)
    assert got.tolist() == expected
    alone = assemble(torch.tensor([7]), two[None], torch.zeros(8, 8, dtype=torch.bool))
    assert alone[3].tolist() == [255, 255, 8, 8, 8, 8, 8, 8]
    nothing = assemble(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 8, 8, dtype=torch.bool), background)
    assert torch.equal(nothing, torch.where(background, 0, 255))


def test_erase_rules():
    maps = torch.arange(100.0).view(1, 10, 10)
    assert select(maps, "quantile", 0.2)[0].nonzero()[:, 0].unique().tolist() == [8, 9]
    assert int(select(maps, "quantile", 0.2).sum()) == 20
    assert int(select(maps, "frac_max", 0.2).sum()) == int((maps > 19.8).sum()) == 80
    assert int(select(maps, "top_band", 0.2).sum()) == int((maps >= 79.2).sum()) == 20
    steps = torch.tensor([0.1, 0.4, 0.9]).repeat_interleave(34)[:100].view(1, 10, 10)
    assert int(select(steps, "quantile", 0.2).sum()) == 20, "of equal pixels no more than the share"
    erased = torch.zeros(10, 10, dtype=torch.bool)
    erased[5:] = True
    left = select(maps, "quantile", 0.2, erased)[0]
    assert left.nonzero()[:, 0].unique().tolist() == [4] and int(left.sum()) == 10
    assert not select(maps, "frac_max", 0.2, torch.ones(10, 10, dtype=torch.bool)).any()


@pytest.mark.parametrize("rule", ["quantile", "frac_max", "top_band"])
def test_a_map_that_says_nothing_gives_no_region(rule):
    assert not select(torch.zeros(2, 5, 5), rule, 0.2).any()
    assert not select(torch.full((1, 5, 5), 0.7), rule, 0.2).any()
    erased = torch.zeros(10, 10, dtype=torch.bool)
    erased[:5] = True
    assert not select(torch.full((1, 10, 10), 0.7), rule, 0.2, erased).any(), "what is erased is no contrast"
    few = torch.zeros(1, 10, 10)
    few[0, 0, :3] = 1.0
    assert int(select(few, rule, 0.2).sum()) == 3, "pixels at zero are never taken"


def test_erasing_twice_changes_nothing():
    """Golden check 7, the fill: an erased pixel is exactly the mean, and stays so."""
    torch.manual_seed(0)
    images, erased, mean = torch.randn(2, 3, 8, 9), torch.rand(2, 8, 9) < 0.4, [117.25, 104.5, 96.125]
    before = images.clone()
    fill_erased(images, erased, mean)
    once = images.clone()
    fill_erased(images, erased, mean)
    assert torch.equal(images, once)
    value = torch.tensor([(m / 255 - a) / s for m, a, s in zip(mean, MEAN, STD, strict=True)])
    assert (images.permute(0, 2, 3, 1)[erased] == value).all()
    assert torch.equal(images.permute(0, 2, 3, 1)[~erased], before.permute(0, 2, 3, 1)[~erased])


def test_stopping_rule_on_the_published_losses():
    said = [stopping_rule([0.05, 0.08, 0.10, 0.15][:t]) for t in (1, 2, 3, 4)]
    assert (
        "first step" in said[0] and said[1].endswith("go on") and said[2].endswith("go on") and "stop" in said[3][-30:]
    )
    assert "limit 0.1300" in said[1] and "limit 0.1300" in said[2] and "limit 0.1300" in said[3]
    assert "says nothing" in stopping_rule([0.05, None])


def test_masks_need_one_cue():
    for cues in ({}, {"saliency": "a", "cams": "b"}):
        with pytest.raises(ValueError, match="either 'saliency' or 'cams'"):
            region_masks.Config(data=DATA, regions="r", **cues)
    assert regions.Config(data=DATA, network="n").rule_of_store == {
        "rule": "quantile",
        "share": 0.2,
        "exclude_erased": False,
    }


# -------------------------------------------------------------------------------------------------- backbones


@pytest.mark.parametrize(
    ("backbone", "dim", "grid"),
    [
        ({}, 1024, 9),
        ({"name": "resnet18", "output_stride": 16}, 512, 5),
        ({"name": "tf_efficientnet_lite0", "output_stride": 8, "frozen_stages": 3}, 320, 9),
        ({"name": "vit_tiny_patch16_224", "output_stride": 16, "frozen_stages": 6}, 192, 4),
    ],
)
def test_backbones_through_one_interface(backbone, dim, grid):
    trunk = Trunk(TrunkConfig(weights=None, **backbone)).eval()
    with torch.no_grad():
        assert trunk(torch.rand(1, 3, 65, 65)).shape == (1, dim, grid, grid) and trunk.dim == dim
    owned = {id(p) for part in (*trunk.pretrained, *trunk.new) for p in part.parameters()}
    assert {id(p) for p in trunk.parameters() if p.requires_grad} <= owned


def test_largefov_is_the_published_network():
    """321 -> 41, fc6 with dilation 12, level 5 dilated by 2; weights of a plain VGG-16 fit."""
    trunk = Trunk(TrunkConfig(weights=None)).eval()
    convs = [m for m in trunk.modules() if isinstance(m, nn.Conv2d)]
    assert [c.dilation[0] for c in convs] == [1] * 10 + [2] * 3 + [12, 1]
    assert [c.out_channels for c in convs] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6 + [1024] * 2
    with torch.no_grad():
        assert trunk(torch.rand(1, 3, 321, 321)).shape[2:] == (41, 41)
    assert trunk.new == [trunk.body.view]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_stride": 16}, "'method.backbone.output_stride' is 16, which 'vgg16.tv_in1k' does not have"),
        ({"name": "vgg11"}, "'vgg11' is no VGG-16 without BatchNorm"),
        ({"name": "vit_tiny_patch16_224", "norm": "fix"}, "'method.backbone.norm' is 'fix'"),
        ({"name": "resnet18", "frozen_stages": 7}, "'method.backbone.frozen_stages' is 7"),
    ],
)
def test_settings_a_backbone_does_not_have(change, message):
    with pytest.raises(UserError, match=message):
        Trunk(TrunkConfig(**{"weights": None, **change}))


def test_the_method_is_found_by_name():
    assert load_method("aepsl").Config is Config and load_method("aepsl").Method is Method
