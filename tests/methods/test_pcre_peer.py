"""The peer of PCRE computes what our method does: that makes a ratio of their times an honest one."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from tests.methods.tiny import random_batch, tiny_method
from wsss_dist.errors import UserError
from wsss_dist.models.prototypes import PrototypeMemory
from wsss_dist.peers import load_peer, operators
from wsss_dist.peers.pcre import Peer

needs_lattice = pytest.mark.skipif(not operators.has_lattice(), reason="pydensecrf2 is not installed")
NO_ENERGY = {"loss": {"reg": 0}}


def both_steps(step: int, seed: int = 0, **changes):
    """Losses and gradients of our step and of the peer's, on the same weights and batch."""
    method, batch, found = tiny_method(seed=seed, **changes), random_batch(size=2, seed=seed), []
    for training_step in (method.training_step, Peer(method).training_step):
        method.zero_grad(set_to_none=True)
        out = training_step(batch, step)
        out["loss"].backward()
        grads = {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
        found.append(({k: v.item() for k, v in out.items() if k.startswith("loss")}, grads))
    return found


# of the run of 100 steps: before the gate, while the radius grows, with the masks mixed in
@pytest.mark.parametrize("step", [5, 25, 90])
@pytest.mark.parametrize(
    "changes", [{}, {"pool": "avg", "backbone": {"name": "vit_tiny_patch16_224", "weights": None, "aux_norm": True}}]
)
def test_the_peer_has_our_losses_and_our_gradient(step, changes):
    (ours, grads), (theirs, other) = both_steps(step, **NO_ENERGY, **changes)
    # rounding of sums in another order; a label that differs in one pixel of 4096 would be off by 1e-4
    for name in theirs:
        assert theirs[name] == pytest.approx(ours[name], rel=1e-5, abs=1e-7), name
    if step == 90:
        assert ours["loss_refine"] > 0 and ours["loss_seg"] > 0 and ours["loss_ptc"] != 0.5 * 0.3
    for part in ("backbone", "classifier", "aux_classifier", "decoder", "crme"):
        names = [n for n in grads if n.startswith(part + ".")]
        if part == "decoder" and step == 5:  # its loss comes later
            assert not names
            continue
        mine, peers = (torch.cat([g[n].flatten() for n in names]) for g in (grads, other))
        assert (mine - peers).norm() <= 1e-4 * mine.norm(), part


@needs_lattice
def test_the_peer_has_our_dense_energy():
    (ours, grads), (theirs, other) = both_steps(90, loss={"reg": 1e3, "seg": 0.12})
    assert theirs["loss_reg"] == pytest.approx(ours["loss_reg"], rel=1e-3) and abs(ours["loss_reg"]) > 0.01
    mine, peers = (torch.cat([g[n].flatten() for n in grads if n.startswith("decoder.")]) for g in (grads, other))
    assert (mine - peers).norm() <= 1e-3 * mine.norm()  # pixels between two cells of the lattice


def test_operators_of_the_peer_are_ours():
    make = torch.Generator().manual_seed(0)
    image, maps = torch.rand(2, 3, 30, 26, generator=make), torch.rand(2, 4, 30, 26, generator=make)
    args = {"dilations": (1, 2, 12), "iterations": 3}
    torch.testing.assert_close(operators.par(image, maps, **args), kernels.par(image, maps, **args), rtol=0, atol=2e-6)
    logits, scores = 3 * torch.randn(2, 30, 30, generator=make), torch.rand(2, 30, 4, generator=make)
    present = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]])
    for radius in (None, 2.0):
        args = {"grid": (5, 6), "radius": radius, "tau": 0.6, "overlap": (0.3, 0.6), "max_seeds": 2, "top": 6}
        got, want = (m.select_regions(logits, scores, present, **args) for m in (operators, kernels))
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
        assert 0 < want.members.sum() < want.members.numel()
        args = {"grid": (5, 6), "size": (40, 48), "radius": radius}
        masks = [m.max_upsampled_masks(logits, want, **args) for m in (operators, kernels)]
        torch.testing.assert_close(*masks, rtol=0, atol=1e-6)


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made inside."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_the_peer_takes_cosines_by_a_product_as_we_do():
    patches, memory = torch.randn(2, 50, 16), PrototypeMemory(7, 16)
    with _Largest() as largest:
        got = operators.cosine_to_prototypes(patches, memory.prototypes)
    torch.testing.assert_close(got, memory(patches), rtol=0, atol=1e-6)
    assert largest.elements == patches.numel(), "broadcast to [B, N, C, D] it would be 7 times as many"


def test_every_peer_is_that_of_a_method():
    assert load_peer("pcre").Peer is Peer
    with pytest.raises(UserError, match="only pcre"):
        load_peer("operators")
