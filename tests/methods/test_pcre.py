"""PCRE: the checks of its specification that concern the method, and the behaviour of a whole step."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.methods.tiny import NUM_CLASSES, random_batch, tiny_method
from wsss_dist.cam import present_pairs
from wsss_dist.methods import load_method
from wsss_dist.methods.base import Views
from wsss_dist.models.prototypes import PrototypeMemory


def grads(method, batch, step, term):
    """Gradient of one loss term with respect to every parameter, by name."""
    method.zero_grad()
    weights = {k: 0.0 for k in ("aux", "ptc", "conf", "refine", "cpe", "seg", "reg")}
    method.cfg = method.cfg.model_copy(update={"loss": method.cfg.loss.model_copy(update=weights | {term: 1.0})})
    out = method(batch, step)
    # L_cls has no weight: take the term alone by subtracting nothing but what carries it
    (out["loss"] - method_cls_loss(method, batch)).backward()
    return {n: p.grad for n, p in method.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-8}


def method_cls_loss(method, batch):
    features = method.backbone(batch.images)
    logits = method._pooled(method.classifier, features.as_map(features.patches))
    return torch.nn.functional.multilabel_soft_margin_loss(logits, batch.labels)


@pytest.mark.parametrize("term", ["conf", "refine"])
def test_pcre_check_5_crme_losses_give_the_vit_no_gradient(term):
    got = grads(tiny_method(), random_batch(), 50, term)
    assert got and {n.split(".")[0] for n in got} == {"crme"}


def test_the_whole_step_sends_the_cpe_gradient_only_through_detached_patches():
    got = grads(tiny_method(), random_batch(), 5, "cpe")
    assert "backbone.class_tokens" in got and not any(n.startswith(("classifier", "decoder", "crme")) for n in got)


def test_pcre_check_10_prototypes_have_unit_norm_and_absent_classes_keep_their_direction():
    torch.manual_seed(0)
    memory = PrototypeMemory(4, 8)
    before = memory.prototypes.clone()
    tokens = torch.randn(3, 4, 8) * 25
    labels = torch.tensor([[1.0, 0, 0, 1], [1, 0, 1, 0], [0, 0, 0, 1]])
    memory.update(tokens, labels, 0.9)
    after = memory.prototypes
    torch.testing.assert_close(after.norm(dim=1), torch.ones(4), rtol=0, atol=1e-6)
    cosine = torch.nn.functional.cosine_similarity(after, before)
    assert cosine[1] == pytest.approx(1.0, abs=1e-6) and (cosine[[0, 2, 3]] < 0.999).all()
    by_hand = 0.9 * (0.9 * before[0] + 0.1 * tokens[0, 0]) + 0.1 * tokens[1, 0]
    torch.testing.assert_close(after[0], by_hand / by_hand.norm(), rtol=1e-5, atol=1e-6)


def test_prototypes_stay_float32_when_the_model_is_cast():
    memory = PrototypeMemory(2, 4)
    exact = memory.prototypes.clone()
    memory.to(torch.bfloat16)
    assert memory.prototypes.dtype == torch.float32 and torch.equal(memory.prototypes, exact)


def test_prototypes_wait_for_their_start_and_move_once_per_step():
    method, batch = tiny_method(), random_batch()
    before = method.memory.prototypes.clone()
    method(batch, 5)
    method.after_step(5)
    assert torch.equal(method.memory.prototypes, before)
    method(batch, 10)
    assert torch.equal(method.memory.prototypes, before)  # not inside the forward: micro batches see the same ones
    method.after_step(10)
    assert not torch.equal(method.memory.prototypes, before)


def test_prototypes_forget_a_step_that_was_skipped():
    moved = []
    for skipped in (False, True):
        method = tiny_method()
        if skipped:
            method(random_batch(seed=7), 19)  # no after_step: the update was not finite
        method(random_batch(), 20)
        method.after_step(20)
        moved.append(method.memory.prototypes)
    assert torch.equal(*moved)


def test_terms_appear_when_the_schedule_says():
    method, batch = tiny_method(), random_batch()
    early, late = method(batch, 10), method(batch, 50)
    assert "loss_seg" not in early and early["loss_refine"] == 0 and "radius" not in early
    assert {"loss_seg", "loss_reg", "refine_inside"} <= set(late) and late["radius"] == 5
    assert method(batch, 25)["radius"] == pytest.approx(3.0)
    for out in (early, late):
        parts = sum(v for k, v in out.items() if k.startswith("loss_"))
        assert out["loss"].item() == pytest.approx(float(parts), rel=1e-5)


def test_radius_off_after_the_growth():
    method = tiny_method(crme={"query_grid": 4, "heads": 4, "ffn": 64, "radius": {"after": "off"}})
    assert method.radius(0.4) == 5 and method.radius(0.41) is None
    assert method(random_batch(), 50)["radius"] == -1


def test_every_trainable_parameter_is_in_one_group_and_gets_a_gradient_late_in_the_run():
    method = tiny_method()
    groups = method.param_groups()
    listed = [id(p) for g in groups for p in g["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in method.parameters() if p.requires_grad}
    factors = {"backbone": 1, "backbone_norm": 1, "class_tokens": 1, "heads": 10, "decoder": 10, "crme": 1}
    assert {g["name"]: g["lr_mult"] for g in groups} == factors
    method(random_batch(), 60)["loss"].backward()
    without = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize(("crme", "cpe"), [(None, None), (None, {}), ({"query_grid": 4, "heads": 4, "ffn": 64}, None)])
def test_ablations_train_and_predict(crme, cpe):
    method, batch = tiny_method(crme=crme, cpe=cpe), random_batch(2)
    out = method(batch, 50)
    out["loss"].backward()
    method.after_step(50)
    assert torch.isfinite(out["loss"])
    assert ("loss_conf" in out) == (crme is not None) and ("loss_cpe" in out) == (cpe is not None)
    prediction = method.predict(batch, Views(extras=True))
    assert prediction.logits.shape == (2, NUM_CLASSES + 1, 64, 64)
    assert set(prediction.extras) == ({"pseudo", "crme"} if crme else {"pseudo"})
    assert method.predict(batch, Views()).extras == {}


def test_crme_masks_are_mixed_in_from_forty_percent_on():
    method, batch = tiny_method(), random_batch()
    before, after = (method._stage(batch, present_pairs(batch.labels), [1.0], [], p) for p in (0.39, 0.4))
    assert before.masks is None and after.masks.shape == (int(batch.labels.sum()), 64, 64)
    assert torch.equal(before.main, after.main)
    torch.testing.assert_close(method._fused(after), 0.3 * after.masks + 0.7 * after.main)
    assert method._fused(before) is before.main
    cam = method.predict(batch, Views()).cam
    assert (cam[batch.labels == 0] == 0).all() and (cam[batch.labels > 0].amax((1, 2)) > 0).any()


def test_an_image_without_any_tag_and_a_batch_without_any_are_finite():
    method, batch = tiny_method(), random_batch()
    batch.labels[0] = 0
    assert torch.isfinite(method(batch, 50)["loss"])
    batch.labels[:] = 0
    out = method(batch, 50)
    out["loss"].backward()
    method.after_step(50)
    assert torch.isfinite(out["loss"])
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


def test_a_fully_padded_image_is_ignored_by_the_patch_labels():
    method, batch = tiny_method(), random_batch()
    batch.boxes[:] = 0
    out = method(batch, 5)
    assert out["loss_ptc"].item() == pytest.approx(0.3 * 0.5)


def test_two_steps_are_reproducible_bit_for_bit():
    losses = []
    for _ in range(2):
        method = tiny_method()
        optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
        for step in (50, 51):
            optimizer.zero_grad()
            loss = method(random_batch(seed=step), step)["loss"]
            loss.backward()
            optimizer.step()
            method.after_step(step)
        losses.append(loss.item())
    assert losses[0] == losses[1]


def test_prediction_does_not_depend_on_its_batch_mates():
    method, batch = tiny_method(), random_batch(2)
    together = method.predict(batch, Views(cam_scales=[1.0, 0.5]))
    for i in range(2):
        one = random_batch(2)
        for name in ("images", "labels", "boxes", "flipped"):
            setattr(one, name, getattr(one, name)[i : i + 1])
        one.ids = one.ids[i : i + 1]
        alone = method.predict(one, Views(cam_scales=[1.0, 0.5]))
        # other GEMM shapes: the same sums in another order
        torch.testing.assert_close(alone.logits[0], together.logits[i], rtol=1e-4, atol=1e-4)


def test_a_prediction_early_in_the_run_has_no_crme_mask():
    method, batch = tiny_method(), random_batch(1)
    assert set(method.predict(batch, Views(step=39, extras=True)).extras) == {"pseudo"}
    assert set(method.predict(batch, Views(step=40, extras=True)).extras) == {"pseudo", "crme"}


def test_other_class_counts_and_odd_sizes():
    torch.manual_seed(0)
    from tests.methods.tiny import tiny_config

    method = load_method("pcre").Method(tiny_config(), 7, 100)
    out = method(random_batch(2, side=80, num_classes=7), 50)
    assert torch.isfinite(out["loss"])


class _Counted(TorchDispatchMode):
    """How often an operation is asked for whose result has a size that depends on values: a GPU is waited for."""

    def __init__(self):
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.waits += str(func) in ("aten.nonzero.default", "aten.masked_select.default")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [2, 4])
def test_the_tags_of_a_micro_batch_are_counted_once_and_once_by_image(size):
    method, batch = tiny_method(), random_batch(size)
    with _Counted() as counted:
        method(batch, 90)
    assert counted.waits == 1 + size, "the second where the label maps are refined, image by image"
