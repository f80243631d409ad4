"""What the stages between the trainings compute, against the formulas of P-NOC written out pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kernels
from wsss_dist.cam import rescaled
from wsss_dist.crf import CRFConfig, LabelCRFConfig, crf_labels, crf_of_labels
from wsss_dist.data import DataConfig
from wsss_dist.data.transforms import normalise
from wsss_dist.errors import UserError
from wsss_dist.stages import affinity_labels, load_kind, random_walk, stage_kinds
from wsss_dist.stages.base import Scores, output, png_writer, read_png, read_scores, scores_writer, views

DATA = DataConfig(format="folder", root="unused")
# a CRF that changes nothing, so that the rules alone are seen
STILL = LabelCRFConfig(iterations=1, spatial=(1.0, 0.0), bilateral=(1.0, 1.0, 0.0))
IMAGE = torch.zeros(3, 1, 6, dtype=torch.uint8)


def labels_config(**changes):
    return affinity_labels.Config(data=DATA, cams="cams", crf=STILL, **changes)


def test_every_kind_has_its_three_names():
    assert stage_kinds() == [
        "affinity_labels",
        "cams",
        "pseudo_masks",
        "random_walk",
        "region_masks",
        "regions",
        "saliency",
        "segmentation",
    ]
    for name in stage_kinds():
        module = load_kind(name)
        assert (
            issubclass(module.Config, affinity_labels.StageConfig) and callable(module.run) and callable(module.picture)
        )


def test_affinity_labels_with_saliency():
    """Salient and a class is sure: the class; salient, none is: undecided; not salient: background."""
    scores = Scores(
        torch.tensor([1, 4]), torch.tensor([[[0.5, 0.3, 0.5, 0.1, 0.6, 0.0]], [[0.4, 0.2, 0.4, 0.9, 0.7, 0]]])
    )
    saliency = torch.tensor([[0.9, 0.9, 0.05, 0.2, 0.11, 0.1]])
    got = affinity_labels.labels_with_saliency(scores, saliency, IMAGE, labels_config(foreground=0.4, background=0.1))
    assert got.tolist() == [[2, 255, 0, 5, 5, 0]]


def test_affinity_labels_of_an_image_without_a_sure_class():
    scores = Scores(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1, 6))
    saliency = torch.tensor([[0.9, 0.0, 0.0, 0.2, 0.0, 0.0]])
    got = affinity_labels.labels_with_saliency(scores, saliency, IMAGE, labels_config())
    assert got.tolist() == [[255, 0, 0, 255, 0, 0]]


def test_affinity_labels_of_cams_alone():
    """IRNet: above the high threshold a class, below the low one background, else undecided."""
    scores = Scores(torch.tensor([2]), torch.tensor([[[0.5, 0.3, 0.2, 0.04, 0.31, 0.0]]]))
    got = affinity_labels.labels_of_cams(scores, IMAGE, labels_config(foreground=0.3, background=0.05))
    assert got.tolist() == [[3, 255, 255, 0, 3, 0]]  # .3 does not beat the background's .3


def test_a_crf_of_labels_is_that_of_its_unary():
    torch.manual_seed(0)
    image = F.interpolate(255 * torch.rand(1, 3, 3, 3), (20, 24), mode="bilinear")[0].to(torch.uint8)
    labels = torch.where(torch.rand(20, 24) < 0.8, 1, torch.randint(0, 3, (20, 24)))
    cfg = LabelCRFConfig(iterations=3, confidence=0.8)
    unary = torch.full((3, 20, 24), -math.log(0.2 / 2)).scatter(0, labels[None], -math.log(0.8))
    expected = kernels.dense_crf(
        unary[None], image[None], spatial=cfg.spatial, bilateral=cfg.bilateral, iterations=3, backend="reference"
    )[0].argmax(0)
    assert torch.equal(crf_of_labels(labels, 3, image, cfg), expected)
    assert (expected != labels).any()
    assert torch.equal(crf_of_labels(labels.clamp(max=0), 1, image, cfg), torch.zeros(20, 24, dtype=torch.int64))


def test_crf_of_labels_against_pydensecrf():
    """Golden check 7 of P-NOC: the labels of the saliency and affinity CRFs, on 20 images, agree on 99.5 % or more."""
    peer = pytest.importorskip("pydensecrf.densecrf", reason="extra 'bench'")
    from pydensecrf.utils import unary_from_labels

    cfg, agree = LabelCRFConfig(), []
    for seed in range(20):
        make = torch.Generator().manual_seed(seed)
        image = 255 * F.interpolate(torch.rand(1, 3, 7, 9, generator=make), (60, 80), mode="bicubic").clamp(0, 1)
        image = (image + 6 * torch.randn(image.shape, generator=make)).clamp(0, 255)[0].to(torch.uint8)
        labels = F.interpolate(torch.rand(1, 4, 8, 8, generator=make), (60, 80), mode="bilinear")[0].argmax(0)
        field = peer.DenseCRF2D(80, 60, 4)
        field.setUnaryEnergy(unary_from_labels(labels.numpy(), 4, gt_prob=0.7, zero_unsure=False))
        field.addPairwiseGaussian(sxy=3, compat=3)
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        field.addPairwiseBilateral(sxy=50, srgb=5, rgbim=pixels, compat=10)
        expected = np.argmax(field.inference(10), axis=0).reshape(60, 80)
        agree.append((crf_of_labels(labels, 4, image, cfg).numpy() == expected).mean())
    assert min(agree) >= 0.995, agree


def test_a_crf_of_logits_without_weights_is_their_argmax():
    logits = torch.randn(4, 8, 9)
    still = CRFConfig(spatial=(1.0, 0.0), bilateral=(1.0, 1.0, 0.0))
    assert torch.equal(crf_labels(logits, torch.zeros(3, 8, 9, dtype=torch.uint8), still), logits.argmax(0))


def test_views_are_the_image_and_its_mirror_image():
    image = torch.randint(0, 256, (3, 10, 13), dtype=torch.uint8)
    whole, half = views(image, [1.0, 0.5])
    assert torch.equal(whole[0], normalise(image)) and torch.equal(whole[1], normalise(image.flip(-1)))
    assert half.shape == (2, 3, 5, 6)


def test_rescaled_as_pillow_does_it():
    from PIL import Image

    image = F.interpolate(255 * torch.rand(1, 3, 8, 6), (40, 30), mode="bilinear").round()
    picture = Image.fromarray(image[0].permute(1, 2, 0).to(torch.uint8).numpy())
    for scale, size in ((1.5, (45, 60)), (0.5, (15, 20))):
        theirs = torch.from_numpy(np.array(picture.resize(size, Image.BICUBIC))).permute(2, 0, 1)
        assert (rescaled(image, scale)[0].clamp(0, 255).round() - theirs).abs().max() <= 1


class EdgesOf(torch.nn.Module):
    """A network whose edge logits are the mean of 4 x 4 pixels of the first channel."""

    def edges(self, images):
        return F.avg_pool2d(images[:, :1], 4, ceil_mode=True, count_include_pad=False)


@pytest.mark.parametrize("canvas", [1, 32])
def test_edges_average_the_logits_of_both_views(canvas):
    """The mirror image is mirrored back before it is averaged, whatever the canvas; sizes are no multiple of 4."""
    pair = torch.randn(1, 3, 18, 23).repeat(2, 1, 1, 1)
    pair[1] = pair[0].flip(-1)
    got = random_walk.edges(EdgesOf(), pair, canvas)
    assert got.shape == (5, 6)
    plain, mirrored = (F.avg_pool2d(F.pad(p[:1], (0, canvas, 0, canvas)), 4)[0, :5, :6] for p in pair)
    if canvas > 1:
        assert torch.allclose(got, ((plain + mirrored.flip(-1)) / 2).sigmoid(), atol=1e-6)
    assert 0 < got.min() and got.max() < 1


def test_the_walk_damps_the_seeds_and_divides_by_one_maximum():
    cfg = random_walk.Config(data=DATA, network="n", cams="c", radius=3, log2_steps=4)
    cams, edge = torch.rand(2, 6, 7), torch.rand(6, 7)
    got = random_walk.walk(cams, edge, (22, 27), cfg)
    seeds = (cams * (1 - edge))[None]
    spread = kernels.random_walk(seeds.double(), edge[None].double(), radius=3, log2_steps=4, backend="reference")
    full = F.interpolate(spread, scale_factor=4, mode="bilinear")[0, :, :22, :27]
    assert torch.allclose(got.double(), full / full.max(), atol=1e-5) and got.shape == (2, 22, 27)
    assert (random_walk.walk(torch.zeros(2, 6, 7), edge, (22, 27), cfg) == 0).all()


def test_nan_edges_are_refused():
    cfg = random_walk.Config(data=DATA, network="n", cams="c")
    with pytest.raises(ValueError, match="random_walk: seeds must be finite, got NaN"):  # damped by the edges before
        random_walk.walk(torch.rand(1, 4, 4), torch.full((4, 4), math.nan), (16, 16), cfg)


def write(path, writer):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        writer(file)


def test_files_come_back_as_they_were_written(tmp_path):
    scores = Scores(torch.tensor([0, 3]), torch.rand(2, 9, 11), torch.rand(2, 3, 3))
    write(output(tmp_path, "train", "a/b", ".npz"), scores_writer(scores))
    got = read_scores(tmp_path, "train", "a/b", (9, 11), torch.tensor([1.0, 0, 0, 1]))
    assert torch.equal(got.classes, scores.classes) and torch.equal(got.maps, scores.maps.half().float())
    assert torch.equal(got.small, scores.small.half().float())
    write(output(tmp_path, "train", "a/b", ".png"), png_writer(torch.arange(99).view(9, 11)))
    assert torch.equal(read_png(tmp_path, "train", "a/b", (9, 11)), torch.arange(99).view(9, 11).byte())
    assert read_scores(tmp_path, "train", "other", (9, 11), torch.zeros(4)) is None
    assert read_png(tmp_path, "train", "a/b").shape == (9, 11)


@pytest.mark.parametrize(
    ("size", "labels", "message"),
    [
        ((9, 12), [1, 0, 0, 1], "is 9 x 11 .height x width., the image 9 x 12"),
        ((9, 11), [1, 0, 1], r"holds the classes .3.; expected indices 0..2"),
        ((9, 11), [1, 1, 0, 1], r"holds the classes .0, 3., the tags of the image are .0, 1, 3."),
    ],
)
def test_scores_that_do_not_fit_name_the_file_and_the_stage(tmp_path, size, labels, message):
    folder = tmp_path / "cams"
    writer = scores_writer(Scores(torch.tensor([0, 3]), torch.rand(2, 9, 11)))
    write(output(folder, "train", "a", ".npz"), writer)
    with pytest.raises(UserError, match=f"train/a.npz cannot be used: {message}.*: the stage 'cams' makes it"):
        read_scores(folder, "train", "a", size, torch.tensor(labels))


def test_scores_that_are_missing_are_none_of_an_image_without_tags(tmp_path):
    with pytest.raises(UserError, match="cams/out/train/a.npz is missing; expected the maps of the 2 tags"):
        read_scores(tmp_path / "cams", "train", "a", (9, 11), torch.tensor([1, 0, 1]))


def test_a_missing_png_names_the_file_and_the_stage(tmp_path):
    with pytest.raises(UserError, match="saliency/out/val/a.png cannot be used: .*the stage 'saliency' makes it"):
        read_png(tmp_path / "saliency", "val", "a", (4, 4))
