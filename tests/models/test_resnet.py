"""ResNeSt and ResNet: equal to their description at both output strides, norm modes, freezing, refused networks."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from tests.models import resnet_reference as reference
from tests.models.networks import assert_ready_for_zero3, count, shake
from wsss_dist.errors import UserError
from wsss_dist.models import resnet
from wsss_dist.models.resnet import ResNet, ResNetConfig

BLOCKS = {"resnest26d": [2, 2, 2, 2], "resnet26": [2, 2, 2, 2], "resnet18": [2, 2, 2, 2], "resnest14d": [1, 1, 1, 1]}
RESNEST_BLOCKS = {"50d": (3, 4, 6, 3), "101e": (3, 4, 23, 3), "200e": (3, 24, 36, 3), "269e": (3, 30, 48, 8)}
# fp64; the order of additions differs in the split attention alone
close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def make(name="resnest14d", **changes):
    torch.manual_seed(0)
    return ResNet(ResNetConfig(name=name, weights=None, **changes))


@functools.cache
def exact(name, output_stride):
    """In fp64, with norms that are not neutral; not to be changed."""
    return shake(make(name, output_stride=output_stride).double()).eval()


@functools.cache
def without_storage(name):
    """On the meta device: shapes alone; not to be changed."""
    with torch.device("meta"):
        return make(name)


def kind_of(name):
    return "resnest" if name.startswith("resnest") else "resnet"


@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize("name", ["resnest26d", "resnet26", "resnet18"])
@pytest.mark.parametrize("training", [False, True])
def test_five_levels_equal_the_description(name, output_stride, training):
    x = reference.randn(2, 3, 65, 47)
    network = exact(name, output_stride)
    w = reference.Weights(network.state_dict(), training)
    network.train(training)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    try:
        with torch.no_grad():
            found = network(x)
            expected = reference.taps(w, x, BLOCKS[name], output_stride, kind_of(name))[1:]
    finally:
        network.load_state_dict(before)
        network.eval()
    assert len(found) == len(network.channels) == len(network.strides) == 5
    for level, (a, b) in enumerate(zip(found, expected, strict=True)):
        close(a, b)
        rows, columns = (-(-side // network.strides[level]) for side in (65, 47))
        assert a.shape == (2, network.channels[level], rows, columns)


@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize("stage", [1, 2, 3, 4])
@pytest.mark.parametrize("k", [0, 1])
def test_resnest_blocks_equal_the_description(stage, k, output_stride):
    network = exact("resnest26d", output_stride)
    block = network.layers[stage - 1][k]
    x = reference.randn(2, block.conv1.in_channels, 9, 12)
    w = reference.Weights(network.state_dict())
    with torch.no_grad():
        close(block(x), reference.resnest_block(w, f"layers.{stage - 1}.{k}", x, stage, k, output_stride))


@pytest.mark.parametrize(
    ("name", "output_stride", "different"),
    [("resnest26d", 16, [4]), ("resnest26d", 8, [3, 4]), ("resnet18", 16, [4]), ("resnet18", 8, [3, 4]),
     ("resnet26", 16, []), ("resnet26", 8, [4])],
)  # fmt: skip
def test_timm_alone_is_not_the_original(monkeypatch, name, output_stride, different):
    monkeypatch.setattr(resnet, "arrange_resnest", lambda *_: None)
    monkeypatch.setattr(resnet, "arrange_resnet", lambda *_: None)
    raw, network = make(name, output_stride=output_stride).double(), exact(name, output_stride)
    raw.load_state_dict(network.state_dict())
    x = reference.randn(1, 3, 64, 48)
    with torch.no_grad():
        pairs = list(zip(raw.eval()(x), network(x), strict=True))
    assert [i for i, (a, b) in enumerate(pairs) if (a - b).abs().max() > 1e-3] == different


def test_resnet50_of_stride_16_is_that_of_torchvision():
    network = shake(make("resnet50").eval())
    twin = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True]).eval()
    renamed = {
        k.replace("stem.0.", "conv1.").replace("stem.1.", "bn1.").replace("layers.3", "layer4")
        .replace("layers.2", "layer3").replace("layers.1", "layer2").replace("layers.0", "layer1"): v
        for k, v in network.state_dict().items()
    }  # fmt: skip
    missing, unknown = twin.load_state_dict(renamed, strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and not unknown
    twin.avgpool, twin.fc = nn.Identity(), nn.Identity()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network(x)[4].flatten(1), twin(x))


def test_resnest269_at_512_pixels():
    network = without_storage("resnest269e")
    shapes = [tuple(tap.shape) for tap in network(torch.empty(2, 3, 512, 512, device="meta"))]
    channels = [128, 256, 512, 1024, 2048]
    assert shapes == [(2, c, s, s) for c, s in zip(channels, [128, 128, 64, 32, 32], strict=True)]
    assert list(network.channels) == channels and network.dim == 2048
    assert network.strides == (4, 4, 8, 16, 16)


@pytest.mark.parametrize(("size", "published"), [("50d", 27.5), ("101e", 48.3), ("200e", 70.2), ("269e", 110.9)])
def test_parameters_of_resnest(size, published):
    network = without_storage(f"resnest{size}")
    found = count(network)
    assert found == reference.resnest_parameters(RESNEST_BLOCKS[size], 32 if size == "50d" else 64)
    assert (found + 2048 * 1000 + 1000) / 1e6 == pytest.approx(published, abs=0.06)  # millions, with the classifier
    assert [len(layer) for layer in network.layers] == list(RESNEST_BLOCKS[size])


@pytest.mark.parametrize(
    ("name", "channels", "parameters"),
    [
        ("resnet18", (64, 64, 128, 256, 512), 11_689_512 - 513_000),  # those of torchvision less the classifier
        ("resnet34", (64, 64, 128, 256, 512), 21_797_672 - 513_000),
        ("resnet50", (64, 256, 512, 1024, 2048), 25_557_032 - 2_049_000),
        ("resnet101", (64, 256, 512, 1024, 2048), 44_549_160 - 2_049_000),
        ("resnest14d", (64, 256, 512, 1024, 2048), reference.resnest_parameters([1, 1, 1, 1], 32)),
        ("resnest26d", (64, 256, 512, 1024, 2048), reference.resnest_parameters([2, 2, 2, 2], 32)),
    ],
)
def test_channels_are_those_of_the_maps(name, channels, parameters):
    network = without_storage(name)
    taps = network(torch.empty(2, 3, 64, 96, device="meta"))
    assert network.channels == channels == tuple(tap.shape[1] for tap in taps)
    assert count(network) == parameters


# ---- norm modes and freezing --------------------------------------------------------------------------------------


def statistics(network):
    return {k: v.clone() for k, v in network.state_dict().items() if "running" in k or "num_batches" in k}


@pytest.mark.parametrize("name", ["resnest14d", "resnet18"])
def test_fix_keeps_statistics_and_affine_parameters(name):
    network, x = shake(make(name, norm="fix")), torch.randn(2, 3, 64, 64)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    expected = network.eval()(x)[-1]
    for _ in range(2):  # eval and train again: fixed norms stay fixed
        before = statistics(network.train())
        assert network.training and not any(m.training for m in norms)
        out = network(x)[-1]
        assert torch.equal(out, expected)
        assert all(torch.equal(v, before[k]) for k, v in statistics(network).items())
    out.sum().backward()
    frozen = {id(p) for m in norms for p in m.parameters()}
    for p in network.parameters():
        assert p.requires_grad == (id(p) not in frozen) == (p.grad is not None)


def test_normal_uses_and_moves_the_statistics():
    network, x = shake(make()), torch.randn(2, 3, 64, 64)
    before, evaluated = statistics(network), network.eval()(x)[-1]
    assert not torch.allclose(network.train()(x)[-1], evaluated)
    assert not any(torch.equal(v, before[k]) for k, v in statistics(network).items())
    assert all(p.requires_grad for p in network.parameters())


def test_a_frozen_stem_stays_as_it_is_and_the_rest_trains():
    network = make(frozen_stages=1).eval().train()
    before = statistics(network)
    network(torch.randn(2, 3, 64, 64))[-1].sum().backward()
    for k, v in statistics(network).items():
        assert torch.equal(v, before[k]) == k.startswith("stem."), k
    for k, p in network.named_parameters():
        assert (p.grad is None) == k.startswith("stem.") != p.requires_grad, k


def test_a_frozen_backbone_stays_as_it_is_and_lets_the_gradient_of_the_image_through():
    network = make(frozen_stages=5).eval().train()
    assert network.training and not any(m.training for m in network.modules() if m is not network)
    before, x = statistics(network), torch.randn(2, 3, 64, 64, requires_grad=True)
    network(x)[-1].sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in statistics(network).items())
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert x.grad.abs().max() > 0


def test_a_resnest_refuses_to_train_on_one_image():
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(UserError, match="'train.micro_batch' is 1, but 'resnest14d'.*norm: fix"):
        make()(x)
    make(norm="fix")(x)
    make(frozen_stages=5)(x)
    make().eval()(x)
    make("resnet18")(x)


def test_random_weights_under_fix_have_no_dead_block():
    network = make("resnet18", norm="fix")
    assert all(m.weight.abs().min() > 0 for m in network.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("name", ["resnest14d", "resnet18"])
def test_ready_for_zero3(name):
    assert_ready_for_zero3(make(name).eval(), torch.zeros(1, 3, 32, 32))


# ---- weights and refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("counters", [True, False])
def test_weights_from_a_file(tmp_path, counters):
    source = shake(timm.create_model("resnest14d"))
    path = tmp_path / "w.safetensors"
    state = {k: v for k, v in source.state_dict().items() if counters or "num_batches_tracked" not in k}
    save_file(state, path, metadata={"note": "made up"})
    network = ResNet(ResNetConfig(name="resnest14d", weights=str(path)))
    assert torch.equal(network.layers[3][0].conv2.fc2.weight, source.layer4[0].conv2.fc2.weight)
    assert torch.equal(network.stem[1].running_var, source.bn1.running_var)
    assert network.weights_note == "made up"


def test_weights_without_statistics_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({k: v for k, v in timm.create_model("resnet18").state_dict().items() if "running_var" not in k}, path)
    with pytest.raises(UserError, match="does not fit backbone 'resnet18': 20 missing"):
        ResNet(ResNetConfig(name="resnet18", weights=str(path)))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_tiny_patch16_224", "it takes no output stride"),
        ("resnet26d", "layer1.0 has another shortcut"),
        ("seresnet18", "layer1.0 has attention"),
        ("resnetblur18", "max pooling"),
        ("resnest50d_4s2x40d", "layer1.0 has no split attention of 2"),
        ("efficientnet_b0", "it takes no output stride"),
        ("resnet_unknown", "not a timm model"),
    ],
)
def test_other_networks_are_refused_with_the_reason(name, reason):
    with torch.device("meta"), pytest.raises(UserError, match=f"'{name}'.*({reason})"):
        make(name)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("resnest26d", lambda m: setattr(m.layer4[0], "avd_last", nn.AvgPool2d(3, 1, 1)), "layer4.0.avd_last"),
        ("resnest26d", lambda m: setattr(m.layer2[0].avd_last, "count_include_pad", False), "count_include_pad"),
        ("resnest26d", lambda m: setattr(m.layer4[0].downsample, "0", nn.Identity()), "Identity in its shortcut"),
        ("resnest26d", lambda m: setattr(m.layer2[0].downsample[0], "ceil_mode", False), "layer2.0.downsample"),
        ("resnest26d", lambda m: setattr(m.layer4[1].conv2.conv, "dilation", (1, 1)), r"layer4.1.conv2.*not 1 and 2"),
        ("resnet18", lambda m: setattr(m.layer4[1].conv2, "dilation", (1, 1)), r"layer4.1.conv2.*not 1 and 2"),
        ("resnet26", lambda m: setattr(m.layer2[0].conv1, "stride", (2, 2)), r"layer2.0.conv1 has stride 2"),
    ],
)
def test_another_structure_in_timm_is_noticed(monkeypatch, name, change, reason):
    def other(*args, **kwargs):
        model = timm.create_model(name, num_classes=0, **kwargs)
        change(model)
        return model

    monkeypatch.setattr(resnet, "create_backbone", other)
    with torch.device("meta"), pytest.raises(UserError, match=f"timm {timm.__version__}.*{reason}"):
        make(name)


@pytest.mark.parametrize("name", ["resnest14d", "resnet18"])
def test_recomputed_blocks_change_nothing(name):
    """Outputs, gradients and running statistics, to the last bit but for the order of sums."""
    torch.manual_seed(1)
    x, results = torch.randn(2, 3, 64, 64, dtype=torch.float64), []
    for recompute in (False, True):
        network = shake(make(name, recompute=recompute).double()).train()
        taps = network(x)
        sum(t.square().mean() for t in taps).backward()
        results.append((taps, [p.grad for p in network.parameters()], list(network.buffers())))
    for plain, again in zip(*results, strict=True):
        for a, b in zip(plain, again, strict=True):
            close(a, b)


def test_recomputed_blocks_keep_fewer_activations():
    kept = []
    for recompute in (False, True):
        network, total = make("resnest14d", recompute=recompute).train(), 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            network(torch.randn(2, 3, 64, 64))
        kept.append(total)
    assert kept[1] < 0.5 * kept[0]
