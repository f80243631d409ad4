"""Backbones that are no ResNet: five levels, freezing, norm modes, weights, refused networks."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

from wsss_dist.errors import UserError
from wsss_dist.models.pyramid import Pyramid, build_pyramid
from wsss_dist.models.resnet import ResNet, ResNetConfig

LITE0 = "tf_efficientnet_lite0"


def make(**changes):
    torch.manual_seed(0)
    return build_pyramid(ResNetConfig(**{"name": LITE0, "weights": None, **changes}))


@pytest.mark.parametrize(("output_stride", "strides"), [(16, (4, 4, 8, 16, 16)), (8, (4, 4, 8, 8, 8))])
def test_five_levels(output_stride, strides):
    network = make(output_stride=output_stride).eval()
    taps = network(torch.randn(1, 3, 96, 64))
    assert network.strides == strides and network.channels == (16, 24, 40, 112, 320) and network.dim == 320
    expected = [(1, c, 96 // s, 64 // s) for c, s in zip(network.channels, strides, strict=True)]
    assert [tuple(t.shape) for t in taps] == expected


def test_levels_are_those_of_timm():
    torch.manual_seed(0)
    theirs = timm.create_model(LITE0, features_only=True, output_stride=16).eval().double()
    network = make().eval().double()
    network.body.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = theirs(x)
    taps = network(x)
    torch.testing.assert_close(taps[0], torch.nn.functional.max_pool2d(expected[0], 3, 2, 1))
    for mine, other in zip(taps[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("stages", range(6))
def test_frozen_stages(stages):
    """What comes before the end of the last frozen level has no gradient and stored statistics; what follows has."""
    network = make(frozen_stages=stages).train()
    taps = network(torch.randn(2, 3, 32, 32))
    for tap in taps[:stages]:
        assert not tap.requires_grad
    for tap in taps[stages:]:
        assert tap.requires_grad
    norms = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        assert norm.training == norm.weight.requires_grad
    assert all(p.requires_grad for p in network.parameters()) == (stages == 0)
    assert any(p.requires_grad for p in network.parameters()) == (stages < 5)


def test_fixed_norms():
    network = make(norm="fix").train()
    before = {k: v.clone() for k, v in network.named_buffers()}
    network(torch.randn(2, 3, 32, 32))
    assert all(torch.equal(v, before[k]) for k, v in network.named_buffers())
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    assert trained and not any(".bn" in n or "bn1" in n for n in trained)


def test_weights_of_the_whole_network_load(tmp_path):
    torch.manual_seed(1)
    whole = timm.create_model(LITE0)
    save_file(whole.state_dict(), tmp_path / "lite0.safetensors", {"note": "drawn at random"})
    network = make(weights=str(tmp_path / "lite0.safetensors"))
    assert torch.equal(network.body.conv_stem.weight, whole.conv_stem.weight)
    assert network.weights_note == "drawn at random"


def test_names_of_resnets_are_resnets():
    assert isinstance(make(name="resnet18"), ResNet) and isinstance(make(), Pyramid)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vgg11"])
def test_other_networks_are_refused(name):
    with pytest.raises(UserError, match=f"backbone '{name}'"):
        make(name=name)
