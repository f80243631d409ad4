"""The class-map head by both of its paths, and the saliency head."""

import math

import torch

from tests.models.networks import assert_ready_for_zero3, count
from wsss_dist.models.cam_heads import CamHead, SaliencyHead


def test_logits_of_both_paths_are_equal():
    head, features = CamHead(64, 5).double(), torch.randn(3, 64, 7, 9, dtype=torch.float64, requires_grad=True)
    maps, logits = head(features), head(features, pooled=True)
    assert maps.shape == (3, 5, 7, 9) and logits.shape == (3, 5)
    torch.testing.assert_close(logits, maps.mean((2, 3)), rtol=1e-12, atol=1e-14)
    grads = [torch.autograd.grad(x.square().sum(), (features, head.conv.weight)) for x in (logits, maps.mean((2, 3)))]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-14)
    assert count(head) == 64 * 5


def test_start_of_the_class_head_is_kaiming_normal():
    weight = CamHead(2048, 80).conv.weight
    assert abs(weight.std() / math.sqrt(2 / 2048) - 1) < 0.01  # 163840 draws: relative error of a deviation 0.17 %
    assert weight.abs().max() > math.sqrt(6 / 2048)  # beyond what a uniform distribution of this deviation reaches


def test_saliency_head_takes_the_deep_map_first():
    head = SaliencyHead((6, 10)).double()
    layer3, layer4 = (torch.randn(2, dim, 5, 7, dtype=torch.float64) for dim in (6, 10))
    features, logits = head(layer3, layer4)
    assert torch.equal(features[:, :10], layer4) and torch.equal(features[:, 10:], layer3)
    padded = torch.nn.functional.pad(features, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    raw = torch.einsum("bchwij,cij->bhw", padded, head.conv.weight[0])[:, None]
    expected = (raw - raw.mean()) / (raw.var(unbiased=False) + head.norm.eps).sqrt()
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert count(head) == 16 * 9 + 2


def test_ready_for_zero3():
    assert_ready_for_zero3(CamHead(4, 2), torch.zeros(1, 4, 3, 3))
    assert_ready_for_zero3(SaliencyHead((4, 8)), torch.zeros(1, 4, 3, 3), torch.zeros(1, 8, 3, 3))
