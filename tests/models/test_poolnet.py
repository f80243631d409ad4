"""PoolNet: its base and its decoder equal to their descriptions, sizes on odd images, what is trained."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.models import resnet_reference as reference
from tests.models.networks import assert_ready_for_zero3, count, shake
from wsss_dist.errors import UserError
from wsss_dist.models.poolnet import CaffeResNet, PoolNet, PoolNetConfig, PoolNetDecoder, caffe_input


def config(name="resnet18"):
    return PoolNetConfig(name=name, weights=None)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return PoolNet(config())


@pytest.mark.parametrize("name", ["resnet18", "resnet26"])
@pytest.mark.parametrize("size", [(65, 47), (64, 96)])  # 64 and 96: ceil mode gives one row and column more
def test_base_equals_its_description(name, size):
    base = shake(CaffeResNet(config(name)).double())
    x = reference.randn(2, 3, *size)
    w = reference.Weights(base.state_dict())
    with torch.no_grad():
        found = base.train()(x)
        expected = reference.taps(w, x, [2, 2, 2, 2], 16, "caffe")
    del expected[1]  # the stem behind its pooling is no tap here
    assert len(found) == 5 and found[3].shape[2:] == found[4].shape[2:]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert base.channels == tuple(tap.shape[1] for tap in found)
    assert base.strides == (2, 4, 8, 16, 16)


@pytest.mark.parametrize("size", [(97, 131), (32, 40), (1, 1)])
def test_logits_have_the_size_of_the_image(network, size):
    with torch.no_grad():
        assert network(torch.randn(1, 3, *size)).shape == (1, 1, *size)


def decoder_reference(d, taps, size):
    """Section 4.2 of the method, tap by tap; convolutions are taken from the decoder by name."""
    w = reference.Weights(d.state_dict())

    def resize(x, size):
        return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)

    e = taps
    x = w.conv("pyramid.reduce", e[4])
    parts = [x]
    for i, grid in enumerate((1, 3, 5)):
        level = w.conv(f"pyramid.levels.{i}.1.0", F.adaptive_avg_pool2d(x, grid)).relu()
        parts.append(resize(level, x.shape[2:]))
    g = w.conv("pyramid.merge.0", torch.cat(parts, 1), padding=1).relu()
    guide = {k: w.conv(f"guides.{3 - k}.0", resize(g, e[k].shape[2:]), padding=1).relu() for k in (3, 2, 1, 0)}
    lateral = [w.conv(f"laterals.{k}.0", e[k]).relu() for k in range(5)]

    def block(i, x):
        total = x
        for j, s in enumerate((2, 4, 8)):
            total = total + resize(w.conv(f"blocks.{i}.convs.{j}", F.avg_pool2d(x, s), padding=1), x.shape[2:])
        return total.relu()

    def fuse(i, x, k):
        x = w.conv(f"blocks.{i}.out", x, padding=1)
        return w.conv(f"blocks.{i}.fuse", x + lateral[k] + guide[k], padding=1)

    x = fuse(0, block(0, lateral[4]), 3)
    x = fuse(1, resize(block(1, x), e[2].shape[2:]), 2)
    x = fuse(2, resize(block(2, x), e[1].shape[2:]), 1)
    x = fuse(3, resize(block(3, x), e[0].shape[2:]), 0)
    x = w.conv("blocks.4.out", block(4, x), padding=1)
    return resize(w.conv("score", x), size)


def test_decoder_equals_its_description():
    channels, sizes = (4, 6, 8, 10, 12), ((19, 22), (11, 13), (8, 10), (8, 9), (8, 9))
    with torch.device("meta"):
        decoder = PoolNetDecoder(channels).double()
    decoder.to_empty(device="cpu")
    for p in decoder.parameters():  # large enough for every term to count
        nn.init.normal_(p, std=p[0].numel() ** -0.5)
    taps = [reference.randn(1, c, *s) for c, s in zip(channels, sizes, strict=True)]
    with torch.no_grad():
        found = decoder(taps, (57, 73))
        assert found.shape == (1, 1, 57, 73) and found.std() > 1e-2
        torch.testing.assert_close(found, decoder_reference(decoder, taps, (57, 73)), rtol=1e-9, atol=1e-9)


def test_parameters_and_start(network):
    with torch.device("meta"):
        full = PoolNet(config("resnet50"))
    pyramid = 2048 * 512 + 3 * 512 * 512 + 2048 * 512 * 9
    guides = 512 * 9 * (512 + 256 + 256 + 128)
    laterals = 64 * 128 + 256 * 256 + 512 * 256 + 1024 * 512 + 2048 * 512
    blocks = sum(27 * k * k + 9 * k * out for k, out in ((512, 512), (512, 256), (256, 256), (256, 128), (128, 128)))
    fuse = 9 * (512**2 + 256**2 + 256**2 + 128**2)
    assert count(full.decoder) == pyramid + guides + laterals + blocks + fuse + 128 + 1
    assert count(full.backbone) == 23_508_032
    for module in network.decoder.modules():
        if isinstance(module, nn.Conv2d):
            # an entry is the mean of n squares: four standard deviations, sqrt(2 / n) each
            error = 4 * (2 / module.weight.numel()) ** 0.5
            assert abs(module.weight.square().mean().item() / 1e-4 - 1) < error
    assert [n for n, _ in network.decoder.named_parameters() if n.endswith("bias")] == ["score.bias"]


def test_what_is_trained(network):
    network.train()
    before = {k: v.clone() for k, v in network.backbone.state_dict().items() if "running" in k}
    network(torch.randn(1, 3, 64, 64)).sum().backward()  # a single image
    for name, p in network.named_parameters():
        assert (p.grad is None) == (not p.requires_grad) == (name.startswith("backbone") and p.dim() == 1), name
    assert all(torch.equal(v, before[k]) for k, v in network.backbone.state_dict().items() if k in before)


def test_input_is_bgr_less_the_mean():
    rgb = torch.tensor([1.0, 0.5, 0.0])[None, :, None, None]
    expected = [0 - 104.00699, 127.5 - 116.66877, 255 - 122.67892]
    torch.testing.assert_close(caffe_input(rgb).flatten(), torch.tensor(expected))


def test_a_resnest_is_refused():
    with pytest.raises(UserError, match="'resnest14d' of PoolNet must be resnet18"):
        PoolNet(config("resnest14d"))


def test_ready_for_zero3(network):
    assert_ready_for_zero3(network, torch.zeros(1, 3, 64, 64))
