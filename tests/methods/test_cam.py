"""CAM functions against hand-computed values."""

import math

import pytest
import torch

from wsss_dist import cam as cams
from wsss_dist.losses import balanced_segmentation_loss, mask_bce


def test_pcre_check_6_radius_is_a_clamped_cosine():
    values = [cams.radius_at(p, 1, 5, 0.1, 0.4) for p in (0.0, 0.1, 0.175, 0.25, 0.325, 0.4, 0.7, 1.0)]
    assert values == pytest.approx([1, 1, 1.5857864, 3, 4.4142136, 5, 5, 5], abs=1e-6)
    dense = [cams.radius_at(i / 1000, 1, 5, 0.1, 0.4) for i in range(1001)]
    assert all(a <= b for a, b in zip(dense, dense[1:], strict=False))


def test_pcre_check_13_fusion_rules():
    z = [torch.tensor([[[[1.0, -2.0]]]]), torch.tensor([[[[3.0, 0.0]]]]), torch.tensor([[[[-1.0, 5.0]]]])]
    voc = cams.fuse_logits(z, [1.0, 1.25, 1.5], "voc")
    assert voc.flatten().tolist() == [1.0, 1.0]  # max(1, mean(1, 3, -1)), max(-2, mean(-2, 0, 5))
    coco = cams.fuse_logits(z, [1.0, 1.25, 1.5], "coco")
    assert torch.equal(coco, torch.stack(z).amax(0))
    # the published COCO rule max(mean(Z_1, Z_1.25), max_s Z_s) is that same maximum
    assert torch.equal(torch.maximum((z[0] + z[1]) / 2, coco), coco)


def test_three_way_labels_and_thresholds():
    maps = torch.tensor([[[[0.9, 0.2, 0.5, 0.25]], [[0.1, 0.25, 0.71, 0.0]]]])  # [1, 2, 1, 4]
    inside = torch.tensor([[[True, True, True, True]]])
    assert cams.training_labels(maps, inside, 0.7, 0.25).flatten().tolist() == [1, 0, 2, 0]
    assert cams.training_labels(maps * 0.8, inside, 0.7, 0.25).flatten().tolist() == [1, 0, 255, 0]
    inside[..., 0] = False
    assert cams.training_labels(maps, inside, 0.7, 0.25).flatten().tolist() == [255, 0, 2, 0]
    assert cams.threshold_labels(maps, 0.5).flatten().tolist() == [1, 0, 2, 0]


def test_boxes_in_pixels_become_boxes_of_whole_patches():
    boxes = torch.tensor([[0, 64, 0, 64], [5, 60, 16, 33]])
    assert cams.grid_boxes(boxes, 16).tolist() == [[0, 4, 0, 4], [1, 3, 1, 2]]
    mask = cams.box_mask(boxes, (64, 64))
    assert mask.sum((1, 2)).tolist() == [64 * 64, 55 * 17]
    assert mask[1, 5, 16] and not mask[1, 4, 16] and not mask[1, 5, 33]


def planes(maps, labels):
    """The maps of the tags alone, one plane per pair."""
    return maps[labels > 0]


def test_merge_mirror_undoes_the_mirror_and_keeps_the_larger():
    maps, labels = torch.rand(2, 3, 4, 5), torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    pairs = cams.present_pairs(labels)
    assert pairs.tolist() == [[0, 0], [0, 2], [1, 1]]
    merged = cams.merge_mirror(torch.cat([maps, maps.flip(-1)]), pairs, (4, 5))
    assert torch.equal(merged, planes(maps, labels))
    bigger = maps.clone()
    bigger[0, 0, 1, 2] += 1
    assert torch.equal(cams.merge_mirror(torch.cat([maps, bigger.flip(-1)]), pairs, (4, 5)), planes(bigger, labels))


def test_minmax_of_constant_and_empty_maps_is_zero():
    maps = torch.zeros(1, 2, 3, 3)
    maps[0, 1] = 7.0
    assert torch.equal(cams.minmax(maps), torch.zeros_like(maps))
    ramp = torch.arange(9.0).view(1, 1, 3, 3)
    assert cams.minmax(ramp).amax() == pytest.approx(8 / (8 + 1e-5))


def test_refined_labels_follow_the_image_edge():
    """Left half red, right half blue; the CAM misses the border of the left and spills over the edge."""
    size = 192
    images = torch.zeros(1, 3, size, size)
    images[:, 0, :, : size // 2], images[:, 2, :, size // 2 :] = 1.0, 1.0
    # noise, so that the affinity's standard deviation is that of a photograph and not 0
    images = (images + 0.02 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    cam = torch.zeros(1, 2, size, size)
    cam[:, 1, 4:188, 4:102] = 1.0
    labels = torch.tensor([[0.0, 1.0]])
    inside = torch.ones(1, size, size, dtype=torch.bool)
    inside[:, -4:] = False
    (out,) = cams.refine_labels([planes(cam, labels)], [(0.7, 0.25)], cams.present_pairs(labels), images, inside)
    assert set(out.unique().tolist()) <= {0, 2, 255}
    assert (out[:, -4:] == 255).all()
    assert (out[0, :184, size // 2 + 2 :] != 2).all()  # nothing crosses the edge
    assert (out == 2).sum() > 1000 and (cams.threshold_labels(cam, 0.5)[0, :184, size // 2 + 2 :] == 2).any()


def test_refined_labels_equal_the_definition_one_threshold_at_a_time():
    import kernels

    g = torch.Generator().manual_seed(1)
    images, cam = torch.rand(2, 3, 32, 32, generator=g), torch.rand(2, 3, 32, 32, generator=g)
    labels = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    cam = cam * labels[..., None, None]
    inside = torch.ones(2, 32, 32, dtype=torch.bool)
    (out,) = cams.refine_labels([planes(cam, labels)], [(0.7, 0.25)], cams.present_pairs(labels), images, inside)
    for b in range(2):
        keys = [0] + [c + 1 for c in range(3) if labels[b, c]]
        small = cams.upsample(images[b : b + 1], (16, 16))
        y = []
        for level in (0.7, 0.25):
            stack = torch.cat([torch.full((1, 1, 32, 32), level), cam[b : b + 1]], 1)[:, keys]
            stack = cams.upsample(stack, (16, 16)).softmax(1)
            best = cams.upsample(kernels.par(small, stack), (32, 32)).argmax(1)[0]
            y.append(torch.tensor(keys)[best])
        expected = torch.where(y[0] != 0, y[0], torch.where(y[1] == 0, 0, 255))
        assert torch.equal(out[b], expected)


def test_an_image_without_tags_is_background():
    inside = torch.ones(1, 16, 16, dtype=torch.bool)
    none = cams.present_pairs(torch.zeros(1, 3))
    (out,) = cams.refine_labels([torch.zeros(0, 16, 16)], [(0.7, 0.25)], none, torch.rand(1, 3, 16, 16), inside)
    assert (out == 0).all()


def test_balanced_loss_by_hand_and_without_any_valid_pixel():
    logits = torch.zeros(1, 3, 1, 4, requires_grad=True)
    labels = torch.tensor([[[0, 1, 1, 255]]])
    loss = balanced_segmentation_loss(logits, labels)
    assert loss.item() == pytest.approx(math.log(3), rel=1e-5)
    empty = balanced_segmentation_loss(logits, torch.full_like(labels, 255))
    empty.backward()
    assert empty.item() == 0.0 and logits.grad.abs().sum() == 0.0


def test_mask_bce_is_the_framework_loss_with_finite_gradients():
    p = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.3, 0.9], requires_grad=True)
    y = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    loss = mask_bce(p, y)
    torch.testing.assert_close(
        loss.detach(), torch.nn.functional.binary_cross_entropy(p.detach(), y, reduction="none"), rtol=1e-6, atol=1e-6
    )
    loss.sum().backward()
    assert p.grad[:4].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(p.grad[4:], torch.tensor([-1 / 0.3, 1 / 0.1]), rtol=1e-5, atol=1e-5)
