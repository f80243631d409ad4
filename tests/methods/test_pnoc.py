"""P-NOC and its parts: golden numbers of the loss, and which gradient reaches which network."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

import kernels
from tests.methods.stage_runs import values
from tests.methods.tiny import NUM_CLASSES, random_batch
from wsss_dist.config import parse_config
from wsss_dist.errors import UserError
from wsss_dist.losses import tag_loss
from wsss_dist.methods.base import Views
from wsss_dist.methods.pnoc import Config, Method, RampConfig, draw_class, stitch, tiles
from wsss_dist.trainer import _identity

BACKBONE = {"name": "resnet18", "weights": None}
FIXED = {**BACKBONE, "norm": "fix"}


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """The weights of a plain classifier, as a stage before would leave them."""
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("oc") / "model.safetensors"
    save_file(Method(Config(variant="plain", backbone=BACKBONE), NUM_CLASSES, 100).state_dict(), path)
    return path


def make(second, variant="p_noc", seed=0, **changes):
    values = {"variant": variant, "backbone": BACKBONE, **changes}
    if variant in ("oc_cse", "p_oc", "p_noc"):
        values["second"] = {"backbone": FIXED, "weights": second}
    torch.manual_seed(seed)
    return Method(Config.model_validate(values), NUM_CLASSES, 100).train()


def gradients(network):
    return {n: None if p.grad is None else p.grad.clone() for n, p in network.named_parameters()}


def test_loss_of_the_paper_to_the_digits():
    logits, tags = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[1.0, 0.0, 1.0]])
    assert tag_loss(logits, tags).item() == pytest.approx(0.3047556, abs=5e-8)
    assert tag_loss(logits, 0.9 * tags + 0.05).item() == pytest.approx(0.3630889, abs=5e-8)


def test_labels_are_smoothed_around_a_half(second):
    smooth = make(second, label_smoothing=0.1)._smooth(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(smooth, torch.tensor([0.05, 0.95]))


def test_ramps():
    ramp = RampConfig(start=0.0, end=4.0, share=0.5)
    assert [ramp.at(p) for p in (0.0, 0.25, 0.5, 0.9)] == [0.0, 2.0, 4.0, 4.0]
    assert RampConfig(start=0.3, end=1.0).at(0.5) == pytest.approx(0.65)
    assert RampConfig(start=0.0, end=2.0, share=0.0).at(0.0) == 2.0


def test_tiles_in_the_order_of_the_paper_and_back():
    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    cut = tiles(x)
    assert cut.shape == (8, 3, 2, 3)
    corners = [x[:, :, :2, :3], x[:, :, :2, 3:], x[:, :, 2:, :3], x[:, :, 2:, 3:]]
    assert torch.equal(cut, torch.cat(corners))
    assert torch.equal(stitch(cut), x)


def test_the_drawn_class_is_the_tag_that_the_draw_says():
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    maps = torch.arange(1.0, 10.0).reshape(3, 3, 1, 1).expand(3, 3, 2, 2)
    for draw, taken in ((0.0, 0), (0.49, 0), (0.5, 2), (0.999999, 2)):
        own, rest = draw_class(maps, labels, torch.full((3,), draw, dtype=torch.float64))
        assert own[0, 0, 0] == maps[0, taken, 0, 0] and rest[0].tolist() == [float(taken == 2), 0.0, float(taken == 0)]
        assert own[1, 0, 0] == 5.0 and rest[1].sum() == 0
        assert own[2].abs().max() == 0 and rest[2].sum() == 0, "without tags there is nothing to erase"


def phases(method, batch, step, leak):
    """Both phases by plain autograd, each with its own backward pass."""
    cfg, g, n = method.cfg, method.generator, method.second
    progress, targets = step / method.train_steps, 0.9 * batch.labels + 0.05
    maps = g(batch.images)
    again = stitch(g(tiles(batch.images)))
    drawn, rest = draw_class(maps, batch.labels, batch.draws)
    up = torch.nn.functional.interpolate(drawn.relu()[:, None], batch.images.shape[2:], mode="bilinear")
    soft = batch.images * (1 - up / (up.max() + 1e-5))
    generator = tag_loss(maps.mean((2, 3)), targets) + tag_loss(again.mean((2, 3)), targets)
    generator = generator + cfg.puzzle.at(progress) * (batch.labels[..., None, None] * (maps - again).abs()).mean()
    leaked = cfg.erase.at(progress) * tag_loss(n(soft, pooled=True), 0.9 * rest + 0.05)
    generator = generator + leaked
    own = [p for p in g.parameters() if p.requires_grad]
    other = [p for p in n.parameters() if p.requires_grad]
    grads_g = torch.autograd.grad(generator, own, retain_graph=True)
    leaks = torch.autograd.grad(leaked, other, retain_graph=True)
    hard = batch.images * (up / (up.amax((1, 2, 3), keepdim=True) + 1e-5) <= cfg.threshold)
    grads_n = torch.autograd.grad(cfg.noc.at(progress) * tag_loss(n(hard.detach(), pooled=True), targets), other)
    if leak:
        grads_n = [a + b for a, b in zip(grads_n, leaks, strict=True)]
    return generator, grads_g, grads_n, leaks


@pytest.mark.parametrize("leak", [False, True])
def test_one_step_against_two_phases_by_plain_autograd(second, leak):
    method, batch, step = make(second, noc_leak=leak), random_batch(), 40
    twin = copy.deepcopy(method)
    want_loss, want_g, want_n, leaks = phases(twin, batch, step, leak)
    out = method.training_step(batch, step)
    out["loss"].backward()
    terms = out["loss"].item() - method.cfg.noc.at(0.4) * out["loss_noc"].item()
    assert terms == pytest.approx(want_loss.item(), rel=1e-5)
    for network, want in ((method.generator, want_g), (method.second, want_n)):
        got = [p.grad for p in network.parameters() if p.requires_grad]
        largest = max(w.abs().max() for w in want)
        error = max((a - b).abs().max() for a, b in zip(got, want, strict=True)) / largest
        print(f"leak {leak}: largest difference of a gradient, as a share of the largest one: {error:.1e}")
        assert error < 2e-5
    assert max(x.abs().max() for x in leaks) > 1e-3 * max(x.abs().max() for x in want_n), "the leak must be seen"


def test_the_generator_has_the_same_gradient_with_and_without_the_leak(second):
    grads = []
    for leak in (False, True):
        method = make(second, noc_leak=leak)
        method.training_step(random_batch(), 40)["loss"].backward()
        grads.append((gradients(method.generator), gradients(method.second)))
    assert all(torch.equal(a, b) for a, b in zip(grads[0][0].values(), grads[1][0].values(), strict=True))
    assert any(
        not torch.equal(a, b) for a, b in zip(grads[0][1].values(), grads[1][1].values(), strict=True) if a is not None
    )


@pytest.mark.parametrize("variant", ["oc_cse", "p_oc"])
def test_an_ordinary_classifier_is_frozen(second, variant):
    method = make(second, variant)
    method.training_step(random_batch(), 40)["loss"].backward()
    assert not any(p.requires_grad or p.grad is not None for p in method.second.parameters())
    assert all(p.grad is not None for p in method.generator.parameters())
    names = [g["name"] for g in method.param_groups()]
    assert names and all(n.startswith("generator_") for n in names)


def test_the_second_classifier_keeps_its_statistics_and_stays_in_evaluation_mode(second):
    method = make(second)
    before = {n: b.clone() for n, b in method.second.named_buffers()}
    method.training_step(random_batch(), 40)["loss"].backward()
    assert not any(m.training for m in method.second.modules())
    assert all(torch.equal(b, before[n]) for n, b in method.second.named_buffers())
    assert all(p.requires_grad and p.grad is not None for p in method.second.parameters() if p.ndim == 4)


TERMS = {
    "plain": {"loss_cls"},
    "puzzle": {"loss_cls", "loss_tiles", "loss_puzzle"},
    "oc_cse": {"loss_cls", "loss_erase"},
    "p_oc": {"loss_cls", "loss_tiles", "loss_puzzle", "loss_erase"},
    "p_noc": {"loss_cls", "loss_tiles", "loss_puzzle", "loss_erase", "loss_noc"},
}


@pytest.mark.parametrize("variant", TERMS)
def test_each_variant_has_its_terms_and_its_scale(second, variant):
    out = []
    for scale in (1.0, 2.0):
        method = make(second, variant, loss_scale=scale)
        out.append(method.training_step(random_batch(), 40))
    assert set(out[0]) == TERMS[variant] | {"loss"}
    assert out[1]["loss"].item() == pytest.approx(2 * out[0]["loss"].item())
    assert all(out[1][k] == out[0][k] and not out[0][k].requires_grad for k in TERMS[variant])


def test_puzzle_looks_at_tags_alone_and_averages_over_all_classes(second):
    method, batch = make(second, "puzzle"), random_batch()
    twin = copy.deepcopy(method)
    got = method.training_step(batch, 0)["loss_puzzle"]
    maps, again = twin.generator(batch.images), stitch(twin.generator(tiles(batch.images)))
    want = sum((maps[b, c] - again[b, c]).abs().sum() for b, c in batch.labels.nonzero().tolist()) / maps.numel()
    torch.testing.assert_close(got, want.detach())


def test_cams_are_summed_over_scales_and_mirror_images_and_peak_at_1(second):
    method, batch = make(second, "plain").eval(), random_batch()
    method.generator.head.conv.weight.data.abs_()  # every class somewhere above 0
    views = Views(cam_scales=[1.0, 0.5])
    cam = method.predict(batch, views).cam
    assert cam.shape == (4, NUM_CLASSES, 64, 64) and cam.min() == 0
    peaks = cam.amax((2, 3))
    assert (peaks[batch.labels == 0] == 0).all() and (peaks[batch.labels == 1] > 0.99).all()
    mirrored = copy.copy(batch)
    mirrored.images = batch.images.flip(-1)
    again = method.predict(mirrored, views).cam.flip(-1)
    torch.testing.assert_close(again, cam, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant, given", [("p_noc", False), ("plain", True), ("puzzle", True), ("p_oc", False)])
def test_the_second_classifier_is_given_where_it_is_used(variant, given):
    values = {"variant": variant, "second": {"weights": "x.safetensors"} if given else None}
    with pytest.raises(ValidationError, match="has no use for 'second'" if given else "needs 'second'"):
        Config.model_validate(values)


def test_weights_of_another_network_or_other_classes_are_refused_before_the_first_step(second, tmp_path):
    with pytest.raises(UserError, match="does not exist.*method.second.weights"):
        make(tmp_path / "none.safetensors")
    other = tmp_path / "other.safetensors"
    save_file(Method(Config(variant="plain", backbone=BACKBONE), NUM_CLASSES + 1, 100).state_dict(), other)
    with pytest.raises(UserError, match=f"other.safetensors.*head.conv.weight.*{NUM_CLASSES + 1}.*{NUM_CLASSES}"):
        make(other)


def test_erasing_uses_the_operators(second, monkeypatch):
    """A backend that is asked for by name must be what runs."""
    seen = []
    original = kernels.erase_soft
    monkeypatch.setattr(kernels, "erase_soft", lambda *a, **k: seen.append(k["maximum"].item()) or original(*a, **k))
    make(second).training_step(random_batch(), 40)
    assert len(seen) == 1 and seen[0] > 0


def test_where_the_second_classifier_came_from_is_no_part_of_the_model():
    """A checkpoint holds its weights: the run goes on after its file was moved."""
    identities = []
    for path in ("here.safetensors", "there.safetensors"):
        section = {"name": "pnoc", "backbone": BACKBONE, "second": {"backbone": FIXED, "weights": path}}
        identities.append(_identity(parse_config(values(section)), ["cat"]))
    assert identities[0] == identities[1] and "method.second.backbone.name" in identities[0]
