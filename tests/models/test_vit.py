"""The ViT's ways to save memory and launches: each against the plain way, scale by scale and with all activations."""

import pytest
import torch

from tests.methods.tiny import backbone_config, random_batch, tiny_method
from wsss_dist.benchmark.live import Live
from wsss_dist.cam import present_pairs
from wsss_dist.errors import UserError
from wsss_dist.models import vit as vit_file
from wsss_dist.models.features import FeatureConfig, FeatureExtractor
from wsss_dist.models.trunk import Trunk, TrunkConfig
from wsss_dist.models.vit import ViT

KINDS = [
    {},
    {"last_block": "attention", "aux_norm": True},
    {"frozen_blocks": 2},
    {"frozen_blocks": 2, "token_cache": True},
    {"name": "vit_small_patch14_reg4_dinov2"},
    {"name": "vit_small_patch14_reg4_dinov2", "frozen_blocks": 2},
]


def make(tmp_path=None, num_class_tokens=3, **changes):
    torch.manual_seed(0)
    if changes.get("token_cache"):
        changes["token_cache"] = tmp_path
    vit = ViT(backbone_config(**{"depth": 4, "aux_block": 3, **changes}), num_class_tokens)
    with torch.no_grad():
        for name in ("class_tokens", "class_pos"):
            getattr(vit, name).add_(torch.randn(num_class_tokens, vit.dim))
    return vit


def views_of(vit):
    """Batches of several sizes, one of another length and one with a rest that is cut off."""
    p = vit.patch_size
    return [torch.randn(n, 3, h * p + rest, w * p) for n, h, w, rest in ((2, 2, 3, 0), (4, 4, 4, 5), (2, 3, 5, 0))]


def loss_of(features):
    return sum(x.sin().mean() for f in features for x in (f.class_tokens, f.patches, f.aux))


def close(a, b):
    # another number of rows in a matrix product: float32 sums in another order
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


# ---- packs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", KINDS)
def test_a_pack_of_sizes_is_each_size_by_itself(changes, tmp_path):
    vit = make(tmp_path, **changes)
    views = views_of(vit)
    results = []
    for run in (lambda: [vit(x) for x in views], lambda: vit.packed(views)):
        vit.zero_grad()
        features = run()
        loss_of(features).backward()
        results.append((features, [p.grad for p in vit.parameters() if p.grad is not None]))
    (alone, grads), (packed, packed_grads) = results
    for a, b in zip(alone, packed, strict=True):
        assert a.grid == b.grid
        for x, y in zip(a[:3], b[:3], strict=True):
            assert x.shape == y.shape
            close(y, x)
    assert len(grads) == len(packed_grads) > 0
    for a, b in zip(grads, packed_grads, strict=True):
        close(b, a)


def test_tokens_of_a_pack_do_not_read_those_of_another_image():
    vit = make()
    views = views_of(vit)
    before = vit.packed(views)
    views[1][2] = torch.randn_like(views[1][2])
    after = vit.packed(views)
    assert torch.equal(before[0].patches, after[0].patches) and torch.equal(before[2].patches, after[2].patches)
    assert torch.equal(before[1].patches[[0, 1, 3]], after[1].patches[[0, 1, 3]])
    assert not torch.equal(before[1].patches[2], after[1].patches[2])


@pytest.mark.parametrize("known", [False, True])
def test_the_cam_stage_is_that_of_one_scale_after_another(known, monkeypatch):
    method, batch = tiny_method(), random_batch()
    features = method.backbone(batch.images) if known else None
    scales = [1.0, 0.5, 1.5], [1.0, 1.25]
    alone = method._stage(batch, present_pairs(batch.labels), *scales, 0.5, features, proto=True)
    backbone, calls = method.backbone, []
    monkeypatch.setattr(backbone, "forward", lambda views: calls.append(len(views)) or backbone.packed(views))
    packed = method._stage(batch, present_pairs(batch.labels), *scales, 0.5, features, proto=True)
    assert calls == [4]
    for name in ("main", "aux", "proto", "masks"):
        torch.testing.assert_close(getattr(packed, name), getattr(alone, name), rtol=1e-4, atol=1e-5)
    for a, b in zip(packed.logits, alone.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- recomputed blocks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("changes", [KINDS[0], KINDS[2], KINDS[4]])
def test_recomputed_blocks_give_the_same_bits(changes, bf16):
    results = []
    for recompute in (False, True):
        vit = make(recompute=recompute, **changes).train()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            loss = loss_of(vit(views_of(vit)))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in vit.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_only_trained_blocks_are_recomputed_and_only_with_gradient(monkeypatch):
    vit, calls = make(recompute=True, frozen_blocks=2), []
    monkeypatch.setattr(vit_file, "recomputed", lambda block, *args: calls.append(block) or block(*args))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        vit(x)
    assert calls == []
    vit(x)
    assert len(calls) == 2


def test_recomputed_blocks_need_less_memory():
    peaks = []
    for recompute in (False, True):
        vit, x = make(recompute=recompute, depth=12, aux_block=10), torch.randn(4, 3, 224, 224)
        vit(x[:1]).patches.mean().backward()  # the gradients are there
        with Live() as live:
            vit(x).patches.mean().backward()
        peaks.append(live.peak)
    # 788 tokens of 192 floats in 12 blocks: about 17 such tensors a block, or one and those of one block
    assert peaks[0] > 12 * 12 * 788 * 192 * 4
    assert peaks[1] < 0.4 * peaks[0]


def test_who_takes_recompute_and_who_refuses_it():
    trunk = Trunk(TrunkConfig(name="vit_tiny_patch16_224", weights=None, recompute=True))
    assert trunk.body.cfg.recompute
    with pytest.raises(UserError, match="'method.backbone.recompute'.*vgg16.*leave it out"):
        Trunk(TrunkConfig(weights=None, recompute=True))
    with pytest.raises(UserError, match="'recompute' are for ViTs here, not for 'resnet18'; remove them"):
        FeatureExtractor(FeatureConfig(name="resnet18", weights=None, recompute=True))
