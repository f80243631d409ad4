"""Learning rates against numbers worked out by hand, and the groups of the optimiser."""

from __future__ import annotations

import pytest
import torch

from tests.train import tiny
from wsss_dist.optim import OptimConfig, build_optimizer, lr_factor, set_lr

VOC = OptimConfig(lr=3e-5)  # PCRE on VOC: 1500 warm-up steps from ratio 1e-6, poly 0.9 over 20000 steps


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 1e-6),
        (1, 1 / 1500 + 1e-6 * 1499 / 1500),
        (750, 0.5000005),
        (1499, 1 - (1 - 1e-6) / 1500),
        (1500, 0.932239),  # 0.925^0.9 = exp(0.9 ln 0.925) = exp(-0.0701654): the jump of the released code
        (10000, 0.535887),  # 0.5^0.9 = exp(-0.6238325)
        (19999, 1.346087e-4),  # (1/20000)^0.9 = exp(-8.9131388)
    ],
)
def test_poly_with_warm_up(step, expected):
    assert lr_factor(step, VOC, 20000) == pytest.approx(expected, rel=2e-6)


def test_cosine_and_constant():
    cosine = OptimConfig(lr=1, schedule="cosine", warmup_steps=100, warmup_ratio=0.1)
    assert lr_factor(50, cosine, 1100) == pytest.approx(0.55)
    assert [lr_factor(s, cosine, 1100) for s in (100, 350, 600)] == pytest.approx([1, 0.5 * (1 + 0.5**0.5), 0.5])
    constant = OptimConfig(lr=1, schedule="constant", warmup_steps=0)
    assert lr_factor(0, constant, 10) == lr_factor(9, constant, 10) == 1


def test_groups():
    method = tiny.Method(tiny.Config(), tiny.C, 10)
    optimizer = build_optimizer(method, method.param_groups(), VOC)
    assert set_lr(optimizer.param_groups, 750, VOC, 20000) == pytest.approx(3e-5 * 0.5000005)
    assert [g["lr"] / 3e-5 for g in optimizer.param_groups] == pytest.approx([0.5000005, 5.000005])
    assert all(g["weight_decay"] == 0.01 for g in optimizer.param_groups)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == sum(p.requires_grad for p in method.parameters())


@pytest.mark.parametrize(
    "settings, expected",
    [
        # p = 2, gradient 0.5, lr 0.1, decay 0.1; two steps by hand
        ({"name": "sgd"}, (2 - 0.1 * 0.7, 1.93 - 0.1 * (0.5 + 0.193))),
        ({"name": "sgd", "momentum": 0.9}, (1.93, 1.93 - 0.1 * (0.9 * 0.7 + 0.693))),
        ({"name": "sgd", "momentum": 0.9, "nesterov": True}, (2 - 0.1 * 1.9 * 0.7, 1.6798270)),
        ({"name": "adam"}, (1.9, 1.8000400)),  # the first step of Adam is lr, whatever the gradient
        ({"name": "adamw"}, (2 * 0.99 - 0.1, 1.88 * 0.99 - 0.1)),
    ],
)
def test_each_optimiser_by_hand(settings, expected):
    method = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(method.weight, 2.0)
    cfg = OptimConfig(lr=0.1, weight_decay=0.1, **settings)
    optimizer = build_optimizer(method, [{"name": "all", "params": [method.weight]}], cfg)
    for value in expected:
        method.weight.grad = torch.full_like(method.weight, 0.5)
        optimizer.step()
        assert method.weight.item() == pytest.approx(value, rel=2e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "sgd", "betas": [0.9, 0.95]}, "'betas' is no setting of name: sgd"),
        ({"momentum": 0.9}, "'momentum' is no setting of name: adamw"),
        ({"name": "sgd", "nesterov": True}, "'nesterov' needs a 'momentum' above 0"),
    ],
)
def test_settings_of_another_optimiser_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(lr=0.1, **settings)


def test_weight_decay_of_a_group_takes_the_place_of_the_general_one():
    method = tiny.Method(tiny.Config(), tiny.C, 10)
    slow, fast = method.param_groups()
    optimizer = build_optimizer(method, [slow, {**fast, "weight_decay": 0.0}], OptimConfig(lr=0.1, weight_decay=0.5))
    before = [p.detach().clone() for p in (method.body[0].weight, method.head.weight)]
    for p in slow["params"] + fast["params"]:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    # decoupled decay without a gradient: p (1 - lr * decay)
    torch.testing.assert_close(method.body[0].weight.detach(), before[0] * 0.95)
    assert torch.equal(method.head.weight, before[1])


def test_a_parameter_forgotten_doubled_or_frozen_is_an_error():
    method = tiny.Method(tiny.Config(), tiny.C, 10)
    slow, fast = method.param_groups()
    with pytest.raises(ValueError, match="no group.*: branch.bias, branch.weight, head.bias, head.weight"):
        build_optimizer(method, [slow], VOC)
    with pytest.raises(ValueError, match="'head.weight' is in two groups, again in 'fast'"):
        build_optimizer(method, [slow, fast, fast], VOC)
    with pytest.raises(ValueError, match="frozen or foreign parameter 'frozen.weight' in group 'f'"):
        build_optimizer(method, [{"name": "f", "params": list(method.frozen.parameters()), "lr_mult": 1.0}], VOC)
    with pytest.raises(ValueError, match="foreign parameter 'a tensor outside"):
        build_optimizer(method, [{"name": "f", "params": [torch.nn.Parameter(torch.ones(1))], "lr_mult": 1.0}], VOC)
