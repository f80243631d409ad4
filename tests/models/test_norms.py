"""BatchNorm: that of torch in one number type, and a mixture of types as a bf16 engine makes it."""

import pytest
import timm
import torch
from torch import nn

from tests.models.networks import shake
from wsss_dist.models.features import FeatureConfig, FeatureExtractor
from wsss_dist.models.norms import BatchNorm2d
from wsss_dist.models.resnet import ResNet, ResNetConfig


@pytest.mark.parametrize("training", [True, False])
def test_equals_that_of_torch(training):
    norm, twin = shake(BatchNorm2d(4)).train(training), nn.BatchNorm2d(4).train(training)
    twin.load_state_dict(norm.state_dict())
    x = torch.randn(3, 4, 5, 6)
    assert torch.equal(norm(x), twin(x))
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in norm.state_dict().items())
    assert norm.num_batches_tracked == int(training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_in_bf16_beside_statistics_in_fp32(training, dtype):
    norm = shake(BatchNorm2d(4)).bfloat16().train(training)
    for buffer in norm.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()
    twin = nn.BatchNorm2d(4).train(training)
    twin.load_state_dict(norm.state_dict())
    x = torch.randn(3, 4, 5, 6).to(dtype)
    out = norm(x)
    assert out.dtype == dtype and norm.running_mean.dtype == torch.float32
    torch.testing.assert_close(out, twin(x.float()).to(dtype), rtol=8e-3, atol=1e-6)  # one rounding to bf16
    out.float().square().sum().backward()
    assert norm.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18"])
def test_any_convolutional_backbone_takes_the_mixture(name):
    body = shake(FeatureExtractor(FeatureConfig(name=name, weights=None, output_stride=16))).eval()
    plain = shake(timm.create_model(name, pretrained=False, num_classes=0, output_stride=16)).eval()
    plain.load_state_dict(body.body.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(body(x), plain.forward_features(x))
    statistics = {k: b.clone() for k, b in body.named_buffers()}
    body.bfloat16().train()
    for k, buffer in body.named_buffers():
        buffer.data = statistics[k]
    with torch.autocast("cpu", torch.bfloat16):
        out = body(x)
    out.float().square().mean().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in body.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["resnest14d", "resnet18"])
@pytest.mark.parametrize("norm", ["normal", "fix"])
def test_backbones_run_as_the_bf16_engine_leaves_them(name, norm):
    network = shake(ResNet(ResNetConfig(name=name, weights=None, norm=norm)))
    statistics = {k: b.clone() for k, b in network.named_buffers()}
    network.bfloat16()
    for k, buffer in network.named_buffers():
        buffer.data = statistics[k]
    with torch.autocast("cpu", torch.bfloat16):
        taps = network(torch.randn(2, 3, 64, 64))
    assert all(tap.isfinite().all() for tap in taps)
    taps[-1].float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)
