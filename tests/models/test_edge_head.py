"""The edge branch: sizes on odd images, its equation, and a backbone that no gradient reaches."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.networks import assert_ready_for_zero3, count, shake
from wsss_dist.models.edge_head import EdgeHead
from wsss_dist.models.resnet import ResNet, ResNetConfig


def make(name="resnet18", **changes):
    torch.manual_seed(0)
    backbone = ResNet(ResNetConfig(name=name, weights=None, norm="fix", frozen_stages=5, **changes))
    return backbone, EdgeHead(backbone.channels, backbone.strides)


@pytest.mark.parametrize("name", ["resnet18", "resnest14d"])
@pytest.mark.parametrize("output_stride", [16, 8])
def test_logits_have_the_size_of_stride_4(name, output_stride):
    backbone, head = make(name, output_stride=output_stride)
    for height, width in ((97, 131), (64, 33)):
        logits = head(backbone(torch.randn(1, 3, height, width)))
        assert logits.shape == (1, 1, (height - 1) // 4 + 1, (width - 1) // 4 + 1)


def test_width_of_the_first_branch_is_that_of_the_stem():
    with torch.device("meta"):
        for name, stem in (("resnet101", 64), ("resnest101e", 128)):
            head = make(name)[1]
            assert head.branches[0][0].in_channels == stem
            assert count(head) == 32 * (stem + 256 + 512 + 1024 + 2048) + 5 * 2 * 32 + 5 * 32 + 1


def test_equation():
    channels, strides = (3, 4, 5, 6, 7), (4, 4, 8, 16, 16)
    head = shake(EdgeHead(channels, strides)).double()
    sizes = ((9, 11), (9, 11), (5, 6), (3, 3), (3, 3))
    taps = [torch.randn(2, c, *s, dtype=torch.float64) for c, s in zip(channels, sizes, strict=True)]
    total = head.score.bias[:, None, None].expand(2, 1, 9, 11)
    for i, (tap, stride) in enumerate(zip(taps, strides, strict=True)):
        conv, norm = head.branches[i]
        x = torch.einsum("bchw,kc->bkhw", tap, conv.weight[:, :, 0, 0])
        groups = x.reshape(2, 4, -1)
        x = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, unbiased=False, keepdim=True) + norm.eps).sqrt()
        x = x.reshape(2, 32, *tap.shape[2:]) * norm.weight[:, None, None] + norm.bias[:, None, None]
        x = F.interpolate(x, scale_factor=stride // 4, mode="bilinear", align_corners=False).clamp_min(0)
        part = head.score.weight[0, 32 * i : 32 * i + 32, 0, 0]
        total = total + torch.einsum("bkhw,k->bhw", x[:, :, :9, :11], part)[:, None]
    torch.testing.assert_close(head(taps), total, rtol=1e-10, atol=1e-10)


def test_gradient_reaches_the_head_alone():
    backbone, head = make()
    backbone.train()
    state = {k: v.clone() for k, v in backbone.state_dict().items()}
    head(backbone(torch.randn(2, 3, 64, 64))).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in head.parameters())
    assert all(p.grad is None for p in backbone.parameters())
    assert all(torch.equal(v, state[k]) for k, v in backbone.state_dict().items())


def test_maps_that_want_a_gradient_get_none():
    head = EdgeHead((4,) * 5, (4, 4, 8, 16, 16))
    taps = [torch.randn(1, 4, 32 // s, 32 // s, requires_grad=True) for s in (4, 4, 8, 16, 16)]
    head(taps).sum().backward()
    assert all(tap.grad is None for tap in taps)


def test_ready_for_zero3():
    backbone, head = make()
    assert_ready_for_zero3(head, backbone(torch.zeros(1, 3, 64, 64)))
