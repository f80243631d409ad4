"""Groups of pretrained and new, weights and biases: each trainable parameter once, with its factor and its decay."""

import pytest
import torch
from torch import nn

from wsss_dist.models.cam_heads import CamHead
from wsss_dist.models.deeplab import DeepLabDecoder
from wsss_dist.models.groups import pretrained_and_new
from wsss_dist.models.resnet import ResNet, ResNetConfig
from wsss_dist.optim import OptimConfig, build_optimizer, set_lr

CFG = OptimConfig(lr=0.1, weight_decay=1e-4, schedule="constant", warmup_steps=0)


def network(head, **changes):
    with torch.device("meta"):
        backbone = ResNet(ResNetConfig(name="resnest14d", weights=None, **changes))
        return nn.ModuleDict({"backbone": backbone, "head": head()})


def test_rates_and_decay():
    net = network(lambda: DeepLabDecoder(256, 2048, 3))
    groups = pretrained_and_new([net["backbone"]], [net["head"]])
    optimizer = build_optimizer(net, groups, CFG)  # refuses a parameter that is missing, doubled or frozen
    set_lr(optimizer.param_groups, 5, CFG, 100)
    found = {g["name"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert found == {
        "pretrained_weights": pytest.approx((0.1, 1e-4)),
        "pretrained_biases": pytest.approx((0.2, 0.0)),
        "new_weights": pytest.approx((1.0, 1e-4)),
        "new_biases": pytest.approx((2.0, 0.0)),
    }
    where = {id(p): g["name"] for g in groups for p in g["params"]}
    first, fuse = net["backbone"].layers[0][0], net["head"].fuse[0]
    assert where[id(first.bn1.weight)] == where[id(first.conv2.fc1.weight)] == "pretrained_weights"
    assert where[id(first.bn1.bias)] == where[id(first.conv2.fc1.bias)] == "pretrained_biases"
    assert where[id(fuse[1].weight)] == where[id(net["head"].score.weight)] == "new_weights"
    assert where[id(fuse[1].bias)] == where[id(net["head"].score.bias)] == "new_biases"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "fix"},
        {"frozen_stages": 1},
        {"frozen_stages": 5},
        {"norm": "fix", "frozen_stages": 1},
    ],
)
def test_each_trainable_parameter_once(changes):
    net = network(lambda: CamHead(2048, 3), **changes)
    groups = pretrained_and_new([net["backbone"]], [net["head"]], prefix="oc_")
    listed = [id(p) for g in groups for p in g["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in net.parameters() if p.requires_grad}
    names = {"oc_pretrained_weights", "oc_pretrained_biases", "oc_new_weights"}  # the head has no bias
    assert {g["name"] for g in groups} == (names if changes.get("frozen_stages", 0) < 5 else {"oc_new_weights"})


def test_factor_of_the_new_part():
    groups = pretrained_and_new([], [nn.Linear(2, 2)], new_lr_mult=3.0)
    assert [(g["lr_mult"], g.get("weight_decay")) for g in groups] == [(3.0, None), (6.0, 0.0)]
