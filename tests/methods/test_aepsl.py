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
from wsss_dist.losses import squared_sigmoid_loss, squared_softmax_loss
from wsss_dist.methods import load_method
from wsss_dist.methods.aepsl import Config, Method
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
    assert 3 * squared_sigmoid_loss(logits, labels).item() == pytest.approx(0.1588683, abs=5e-8)


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
        ({"name": "vit_tiny_patch16_224", "frozen_stages": 6}, 192, 5),
    ],
)
def test_backbones_through_one_interface(backbone, dim, grid):
    trunk = Trunk(TrunkConfig(weights=None, **backbone)).eval()
    with torch.no_grad():
        assert trunk(torch.rand(1, 3, 65, 65)).shape == (1, dim, grid, grid) and trunk.dim == dim


PLACES = [
    ({}, 0),
    ({"name": "resnet18", "output_stride": 8}, 0),
    ({"name": "resnet18", "output_stride": 16}, 0),
    ({"name": "efficientnet_lite0", "output_stride": 16}, 0),
    ({"name": "tf_efficientnet_lite0", "output_stride": 8}, 4),
    ({"name": "tf_efficientnet_lite0", "output_stride": 16}, 8),
    ({"name": "vit_tiny_patch16_224"}, 8),
]


def made_linear(module):
    """Convolutions and pools that average, and nothing else: the gradient of a cell is as wide as what it sees."""
    for name, child in module.named_children():
        if isinstance(child, nn.MaxPool2d):
            setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
        elif isinstance(child, nn.modules.batchnorm._BatchNorm | nn.ReLU | nn.ReLU6):
            setattr(module, name, nn.Identity())
        else:
            made_linear(child)
    if isinstance(module, nn.Conv2d):
        nn.init.constant_(module.weight, 1 / module.weight[0].numel())


@pytest.mark.parametrize(("backbone", "offset"), [p for p in PLACES if "tf_" not in p[0].get("name", "")])
def test_a_cell_stands_for_the_pixel_it_looks_at(backbone, offset):
    """The centre of gravity of a cell's gradient on the image; of a ViT, which sees all of it, of the strong part."""
    torch.manual_seed(0)
    trunk = Trunk(TrunkConfig(weights=None, **backbone)).eval().double()
    side = 256 if trunk.is_vit else 257  # as much of the image on both sides of the cell
    if not trunk.is_vit:
        made_linear(trunk)
    images = torch.rand(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    features = trunk(images)
    cell = features.shape[-1] // 2
    (features[0, :, cell, cell] * torch.rand(trunk.dim)).sum().backward()
    pull, along = images.grad[0].abs().sum(0), torch.arange(float(side))
    if trunk.is_vit:
        pull = (pull / pull.max()) ** 4
    places = [((pull.sum(d) * along).sum() / pull.sum()).item() - cell * trunk.patch_size for d in (0, 1)]
    assert trunk.offset == offset
    assert places == pytest.approx([offset - 0.5 * trunk.is_vit] * 2, abs=1.0)


@pytest.mark.parametrize("size", [(321, 321), (64, 48), (33, 40), (97, 121)])
@pytest.mark.parametrize(("backbone", "offset"), PLACES)
def test_maps_and_labels_lie_where_the_cells_are(backbone, offset, size):
    """A ramp over the image, picked at the cells and put back, is itself between the outer cells; so are labels."""
    trunk = Trunk(TrunkConfig(weights=None, **backbone)).eval()
    stride = trunk.patch_size
    grid = tuple(-(-side // stride) for side in size)
    with torch.no_grad():
        assert trunk(torch.zeros(1, 3, *size)).shape[2:] == grid
    middle = (stride - 1) / 2 if offset else 0
    y, x = (middle + stride * torch.arange(n).float() for n in grid)
    back = trunk.to_image((3 * y[:, None] + x)[None, None], size)
    assert back.shape == (1, 1, *size)
    rows, columns = (torch.arange(float(side)).clamp(at[0], at[-1]) for side, at in zip(size, (y, x), strict=True))
    torch.testing.assert_close(back[0, 0], 3 * rows[:, None] + columns, rtol=1e-5, atol=1e-3)
    labels = (torch.arange(size[0] * size[1]).view(1, *size) % 251).to(torch.uint8)
    picked = trunk.at_cells(labels, grid, 255)
    inside = labels[:, offset::stride, offset::stride]
    assert picked.shape[1:] == grid and torch.equal(picked[:, : inside.shape[1], : inside.shape[2]], inside)
    assert (picked[:, inside.shape[1] :] == 255).all() and (picked[:, :, inside.shape[2] :] == 255).all()


@pytest.mark.parametrize("size", [(64, 64), (70, 53)])
def test_class_maps_of_the_mirror_image_are_mirrored_back(size):
    network = method("erasing").eval()
    images, pairs = torch.rand(2, 3, *size), torch.tensor([[0, 1], [1, 0], [1, 2]])
    both = network.class_maps(images, pairs)
    assert both.shape == (3, *size)
    torch.testing.assert_close(
        both, network.class_maps(images, pairs, False) + network.class_maps(images.flip(-1), pairs, False).flip(-1)
    )


def test_the_last_layers_alone_learn_ten_times_as_fast():
    """Section 3.2 of the paper: 0.001, and 0.01 for the last layer; biases twice that, as in DeepLab."""
    cfg = Config(variant="segmentation", backbone=TrunkConfig(weights=None))
    network = Method(cfg, NUM_CLASSES, 10)
    rates = {id(p): g["lr_mult"] for g in network.param_groups() for p in g["params"]}
    assert {id(p) for p in network.parameters()} == set(rates)
    last = (network.head.conv.weight, network.segmenter.weight)
    assert [rates[id(p)] for p in last] == [10, 10] and rates[id(network.segmenter.bias)] == 20
    assert {rates[id(p)] for p in network.backbone.parameters()} == {1, 2}


@pytest.mark.parametrize(
    "given", [{"psl": "off"}, {"prohibition": 0.2}, {"loss_size": "full"}, {"prohibit_by": "tags"}]
)
def test_settings_of_the_segmentation_are_none_of_the_classifier(given):
    with pytest.raises(ValueError, match=f"'{next(iter(given))}' is no setting of variant: erasing"):
        Config(variant="erasing", **given)


def test_largefov_is_the_published_network():
    """321 -> 41, fc6 with dilation 12, level 5 dilated by 2; weights of a plain VGG-16 fit."""
    trunk = Trunk(TrunkConfig(weights=None)).eval()
    convs = [m for m in trunk.modules() if isinstance(m, nn.Conv2d)]
    assert [c.dilation[0] for c in convs] == [1] * 10 + [2] * 3 + [12, 1]
    assert [c.out_channels for c in convs] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6 + [1024] * 2
    with torch.no_grad():
        assert trunk(torch.rand(1, 3, 321, 321)).shape[2:] == (41, 41)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_stride": 16}, "'method.backbone.output_stride' is 16, which 'vgg16.tv_in1k' does not have"),
        ({"name": "vgg11"}, "'vgg11' is no VGG-16 without BatchNorm"),
        ({"name": "vit_tiny_patch16_224", "norm": "fix"}, "'method.backbone.norm' is 'fix'"),
        ({"name": "vit_tiny_patch16_224", "output_stride": 16}, "'method.backbone.output_stride' is 16.*leave it out"),
        ({"name": "resnet18", "frozen_stages": 7}, "'method.backbone.frozen_stages' is 7"),
    ],
)
def test_settings_a_backbone_does_not_have(change, message):
    with pytest.raises(UserError, match=message):
        Trunk(TrunkConfig(**{"weights": None, **change}))


def test_the_method_is_found_by_name():
    assert load_method("aepsl").Config is Config and load_method("aepsl").Method is Method
