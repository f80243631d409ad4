"""PCRE against naive recomputations and spies: which map, which target, which disc goes where."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from tests.methods.tiny import random_batch, tiny_method
from wsss_dist import cam as cams
from wsss_dist.methods import pcre
from wsss_dist.methods.base import Views
from wsss_dist.models.vit import Features

ZERO = {k: 0.0 for k in ("aux", "ptc", "conf", "refine", "cpe", "seg", "reg")}
CRME = {"query_grid": 4, "heads": 4, "ffn": 64}


def spy(monkeypatch, owner, name):
    """Every call of a function from now on: (positional arguments, keywords, result)."""
    original, calls = getattr(owner, name), []

    def noted(*args, **kwargs):
        calls.append((args, kwargs, original(*args, **kwargs)))
        return calls[-1][2]

    monkeypatch.setattr(owner, name, noted)
    return calls


def test_pcre_check_5_cpe_reaches_class_tokens_keys_and_values_but_not_patches(monkeypatch):
    method = tiny_method(loss=ZERO | {"cpe": 1.0})
    monkeypatch.setattr(pcre, "tag_loss", lambda logits, labels: logits.sum() * 0)
    original, seen = method.backbone.forward, []

    def kept(images):
        features = original(images)
        if isinstance(features, Features) and features.patches.requires_grad:
            features.patches.retain_grad()
            seen.append(features)
        return features

    monkeypatch.setattr(method.backbone, "forward", kept)
    out = method(random_batch(), 50)
    assert out["loss"].item() == pytest.approx(out["loss_cpe"].item()) and out["loss"] > 0
    out["loss"].backward()
    (features,) = seen
    assert features.patches.grad is None or not features.patches.grad.any()
    assert method.backbone.class_tokens.grad.abs().max() > 1e-6
    dim = method.backbone.dim
    for block in method.backbone.blocks[:-1]:
        _, key, value = block.attn.qkv.weight.grad.split(dim)
        assert key.abs().max() > 1e-9 and value.abs().max() > 1e-9  # the keys' is small: the tokens are near equal
    query, key, value = method.backbone.blocks[-1].attn.qkv.weight.grad.split(dim)
    assert not query.any() and not key.any() and value.any()


def test_predictions_of_mirror_images_are_mirrored():
    method, batch = tiny_method(), random_batch(2, side=64)
    batch.images = batch.images[..., :48, :]  # not square
    batch.boxes[:] = torch.tensor([0, 48, 0, 64])
    mirrored = random_batch(2)
    mirrored.images, mirrored.labels, mirrored.boxes = batch.images.flip(-1), batch.labels, batch.boxes
    views = Views([1.0, 0.5], [1.0, 1.5], extras=True)
    plain, other = method.predict(batch, views), method.predict(mirrored, views)
    for name, a, b in (
        ("cam", plain.cam, other.cam),
        ("logits", plain.logits, other.logits),
        ("crme", plain.extras["crme"], other.extras["crme"]),
    ):
        assert (a - a.flip(-1)).abs().max() > 1e-3, name  # no symmetric map, which would prove nothing
        # the same images at another place of the batch: sums in another order
        torch.testing.assert_close(b, a.flip(-1), rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def disc(queries, grid, radius):
    """[n, h, w] 0/1: cells within `radius` of each query patch."""
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    away = [(y - q // grid[1]) ** 2 + (x - q % grid[1]) ** 2 for q in queries]
    return torch.stack([(d <= radius**2).float() for d in away])


@pytest.mark.parametrize("ignore_as_negative", [True, False])
@pytest.mark.parametrize("step", [17, 50])
def test_refine_loss_equals_its_definition(step, ignore_as_negative, monkeypatch):
    after = "off" if step == 50 else "hold"
    method = tiny_method(
        loss=ZERO | {"refine": 3.0},
        crme=CRME | {"radius": {"after": after}, "ignore_as_negative": ignore_as_negative},
    )
    batch = random_batch(2)
    batch.labels = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    generator = torch.Generator().manual_seed(3)
    # every value in both images: background, each class with or without tag, undecided
    y_seg, y_pro = (
        torch.tensor([0, 1, 2, 3, 255])[torch.randint(5, (2, 64, 64), generator=generator)] for _ in range(2)
    )
    monkeypatch.setattr(method, "_pseudo_labels", lambda *_: (y_seg, y_pro))
    got = method(batch, step)["loss_refine"]

    u = (0.17 - 0.1) / 0.3
    radius = None if after == "off" else 1 + 4 * (1 - math.cos(math.pi * u)) / 2
    with torch.no_grad():
        features = method.backbone(batch.images)
        logits, scores = method.crme(batch.images, features.patches, features.grid)
    chosen = kernels.select_regions(logits, scores, batch.labels, grid=(4, 4), radius=radius)
    total, pairs = 0.0, [(0, 0), (0, 2), (1, 1)]
    assert chosen.pairs.tolist() == [list(p) for p in pairs] and chosen.members.any(1).all()
    for (image, label), members in zip(pairs, chosen.members, strict=True):
        queries = members.nonzero().flatten()
        masks = logits[image, queries].sigmoid().view(-1, 1, 4, 4)
        if radius is not None:
            masks = masks * disc(queries.tolist(), (4, 4), radius)[:, None]
        mask = F.interpolate(masks, (64, 64), mode="bilinear").amax((0, 1))
        bce = F.binary_cross_entropy(mask, (y_pro[image] == label + 1).float(), reduction="none")
        total += (bce if ignore_as_negative else bce * (y_pro[image] != 255)).mean().item()
    assert got.item() == pytest.approx(3.0 * total / 3, rel=1e-5)


def test_the_disc_is_in_the_loss_and_in_no_mask_of_the_pseudo_labels(monkeypatch):
    method, batch = tiny_method(), random_batch()
    selections, masks = (spy(monkeypatch, kernels, n) for n in ("select_regions", "max_upsampled_masks"))
    method(batch, 30)  # no CRME masks yet
    method(batch, 45)  # those of two scales, then the loss
    method.predict(batch, Views())
    growing = 1 + 4 * (1 - math.cos(math.pi * 2 / 3)) / 2
    for calls in (selections, masks):
        radii = [kwargs.get("radius") for _, kwargs, _ in calls]
        assert radii == [pytest.approx(growing), None, None, 5, None]
    for _, kwargs, _ in selections:
        assert (kwargs["tau"], kwargs["overlap"], kwargs["max_seeds"], kwargs["top"]) == (0.7, (0.3, 0.5), 5, 300)
    assert not any(args[0].requires_grad or args[1].requires_grad for args, _, _ in selections)


def test_each_refined_map_has_its_own_thresholds(monkeypatch):
    cam = {"scales": [1.0], "high": 0.61, "low": 0.22, "proto_high": 0.93, "proto_low": 0.34}
    method, batch = tiny_method(cam=cam), random_batch()
    stages, calls = spy(monkeypatch, method, "_stage"), spy(monkeypatch, cams, "refine_labels")
    targets, refined = spy(monkeypatch, method, "_crme_losses"), spy(monkeypatch, method, "_segmentation_losses")
    method(batch, 50)
    (maps, thresholds, pairs, images, inside), _, results = calls[0]
    stage = stages[0][2]
    assert thresholds == [(0.61, 0.22), (0.93, 0.34)]
    torch.testing.assert_close(maps[0], 0.3 * stage.masks + 0.7 * stage.main, rtol=0, atol=1e-6)
    assert torch.equal(maps[1], stage.proto)  # never mixed
    assert not torch.equal(maps[0], maps[1]) and torch.equal(pairs, batch.labels.nonzero())
    assert torch.equal(images, batch.rgb()) and torch.equal(inside, cams.box_mask(batch.boxes, (64, 64)))
    assert torch.equal(refined[0][0][2], results[0]) and torch.equal(targets[0][0][3], results[1])


@pytest.mark.parametrize("step", [5, 50])
def test_patch_labels_come_from_the_auxiliary_cam_unmixed(step, monkeypatch):
    method, batch = tiny_method(), random_batch()
    stages = spy(monkeypatch, method, "_stage")
    patches, tokens = (spy(monkeypatch, kernels, n) for n in ("patch_token_contrast", "class_patch_contrast"))
    method(batch, step)
    inside = torch.ones(4, 4, 4, dtype=torch.bool)
    inside[3, :, 2:] = False  # 20 of 64 columns are padding: the third patch is not whole

    def labels_of(maps):
        grid = torch.zeros(*batch.labels.shape, 4, 4)
        grid[batch.labels > 0] = F.interpolate(maps[None], (4, 4), mode="bilinear")[0]
        value, best = grid.max(1)
        label = torch.where(value > 0.7, best + 1, torch.where(value <= 0.25, 0, 255))
        return torch.where(inside, label, 255).flatten(1)

    expected, main = labels_of(stages[0][2].aux), labels_of(stages[0][2].main)
    assert not torch.equal(expected, main)
    assert torch.equal(patches[0][0][1], expected) and torch.equal(tokens[0][0][2], expected)


def test_a_step_runs_under_autocast_of_a_gpu(monkeypatch):
    """Some functions are refused there alone. Tensors without values stand for those on a GPU."""
    method, batch = tiny_method(), random_batch()
    pairs = partial(torch.empty, 5, 2, dtype=torch.int64)  # their number depends on values
    monkeypatch.setattr(cams, "present_pairs", lambda labels: pairs(device=labels.device))
    with FakeTensorMode(allow_non_fake_inputs=True):
        method._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
        for name in ("images", "labels", "boxes"):
            value = getattr(batch, name)
            setattr(batch, name, torch.empty(value.shape, dtype=value.dtype, device="cuda"))
        before = torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            assert method.decoder(torch.empty(1, method.backbone.dim, 4, 4, device="cuda")).dtype == torch.bfloat16
            out = method(batch, 5)
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", before)
            torch.clear_autocast_cache()
    assert {"loss_cls", "loss_aux", "loss_ptc", "loss_cpe", "loss_conf"} <= set(out)
    assert out["loss"].device.type == "cuda" and out["loss"].dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_late_step_is_finite_in_half_precision(device):
    method, batch = tiny_method().to(device), random_batch().to(device)
    with torch.autocast(device, torch.bfloat16, cache_enabled=False):
        out = method(batch, 50)
    out["loss"].backward()
    method.after_step(50)
    assert out["loss"].isfinite() and all(p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)
