"""DeepLabV3+: sizes on odd images, its equation, parameters and where the gradient goes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.models.networks import assert_ready_for_zero3, count, shake
from wsss_dist.models.deeplab import DeepLabDecoder
from wsss_dist.models.resnet import ResNet, ResNetConfig


@pytest.mark.parametrize("output_stride", [16, 8])
def test_logits_have_the_size_of_layer1_or_of_the_image(output_stride):
    backbone = ResNet(ResNetConfig(name="resnet18", weights=None, output_stride=output_stride))
    decoder = DeepLabDecoder(backbone.channels[1], backbone.channels[4], 21)
    taps = backbone(torch.randn(1, 3, 97, 131))
    assert decoder(taps[1], taps[4]).shape == (1, 21, 25, 33)
    logits = decoder(taps[1], taps[4], (97, 131))
    assert logits.shape == (1, 21, 97, 131)
    logits.square().mean().backward()
    for network in (decoder, backbone):
        for name, p in network.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name
    assert all(p.grad.abs().max() > 0 for n, p in decoder.named_parameters() if n.startswith("score"))


def unit(x, sequence, padding=0, dilation=1):
    conv, norm = sequence[0], sequence[1]
    x = F.conv2d(x, conv.weight, None, padding=padding, dilation=dilation)
    groups = x.unflatten(1, (4, -1))
    mean, var = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), unbiased=False, keepdim=True)
    x = ((groups - mean) / (var + norm.eps).sqrt()).flatten(1, 2)
    return (x * norm.weight[:, None, None] + norm.bias[:, None, None]).relu()


def test_equation():
    decoder = shake(DeepLabDecoder(8, 12, 3)).double().eval()
    low = torch.randn(2, 8, 25, 39, dtype=torch.float64)
    high = torch.randn(2, 12, 13, 20, dtype=torch.float64)  # wide enough for a rate of 18
    aspp = decoder.aspp
    parts = [unit(high, aspp.branches[0])]
    parts += [unit(high, aspp.branches[1 + i], padding=r, dilation=r) for i, r in enumerate((6, 12, 18))]
    pooled = unit(high.mean((2, 3), keepdim=True), aspp.image)
    parts.append(F.interpolate(pooled, (13, 20), mode="bilinear", align_corners=True))
    x = unit(torch.cat(parts, 1), aspp.project[0])
    x = F.interpolate(x, (25, 39), mode="bilinear", align_corners=True)
    x = unit(torch.cat([x, unit(low, decoder.reduce)], 1), decoder.fuse[0], padding=1)
    x = unit(x, decoder.fuse[2], padding=1)
    x = F.conv2d(x, decoder.score.weight, decoder.score.bias)
    with torch.no_grad():
        torch.testing.assert_close(decoder(low, high), x, rtol=1e-9, atol=1e-9)
        x = F.interpolate(x, (67, 83), mode="bilinear", align_corners=True)
        torch.testing.assert_close(decoder(low, high, (67, 83)), x, rtol=1e-9, atol=1e-9)


def test_parameters_dropout_and_start():
    with torch.device("meta"):
        decoder = DeepLabDecoder(256, 2048, 21)
    norms = 2 * (256 * 6 + 48 + 256 * 2)
    aspp = 2048 * 256 * (1 + 3 * 9 + 1) + 1280 * 256
    assert count(decoder) == aspp + 256 * 48 + 304 * 256 * 9 + 256 * 256 * 9 + 256 * 21 + 21 + norms
    assert [m.p for m in decoder.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5, 0.1]
    assert {m.num_groups for m in decoder.modules() if isinstance(m, nn.GroupNorm)} == {4}
    weight = DeepLabDecoder(64, 64, 21).fuse[2][0].weight
    assert abs(weight.std() / math.sqrt(2 / (256 * 9)) - 1) < 0.01


def test_ready_for_zero3():
    assert_ready_for_zero3(DeepLabDecoder(8, 16, 3), torch.zeros(1, 8, 8, 8), torch.zeros(1, 16, 2, 2), (32, 32))
