"""Equal bits for every op: 20 runs on one and on two threads, and a sample at each position of a batch. The other modes
of dense_crf: test_dense_crf_modes.py."""

import functools
import hashlib

import pytest
import torch

import kernels
from kernels import available_backends
from kernels.backend import AUTO

RUNS = 20
ORDERS = ([0, 1, 2], [2, 0, 1], [1, 2, 0])  # sample 0 comes first, second, third
# A reference is plain torch, where even a sigmoid may have other bits in a vector than at the end of a thread's share:
# it promises equal bits on one thread. Those of these are decisions and counts.
STEADY_REFERENCES = {"dilate_regions", "path_affinity_counts", "select_regions"}


# The inputs are made once: plain torch may give other bits on other threads.
@functools.cache
def rand(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@functools.cache
def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@functools.cache
def probabilities(*shape):
    return randn(*shape).softmax(1)


def leaf(x):
    return x.clone().requires_grad_()


@functools.cache
def picture(h, w):
    image = torch.nn.functional.interpolate(rand(3, 3, 7, 7), (h, w), mode="bilinear")
    return image + 0.05 * rand(3, 3, h, w)


# Each case: order of the three samples, backend -> (results of the batch, results of the samples [B, ...]).
def par(order, backend):
    image, maps = picture(41, 53)[order], rand(3, 5, 41, 53)[order]
    return [], [kernels.par(image, maps, iterations=3, backend=backend)]


def dense_crf(order, backend, **options):
    unary, image = 3 * rand(3, 6, 72, 80)[order], 200 * picture(72, 80)[order]
    unary[:, 4:] += 20  # pruned, where that is asked for
    return [], [kernels.dense_crf(unary, image, iterations=2, backend=backend, **options)]


def dense_energy(order, backend):
    probs, image = leaf(probabilities(3, 5, 96, 112)[order]), 200 * picture(96, 112)[order]
    roi, labels = torch.ones(3, 96, 112), torch.where(rand(3, 96, 112) < 0.5, 255, 1)[order]
    value = kernels.dense_energy(probs, image, roi, labels, backend=backend)
    return [value.detach()], [*torch.autograd.grad(value, probs)]


def random_walk(order, backend):
    h, w = (12, 15) if backend == "reference" else (30, 37)  # a dense [h w, h w] matrix, squared
    seeds, edges = leaf(rand(3, 5, h, w)[order]), rand(3, h, w)[order]
    out = kernels.random_walk(seeds, edges, log2_steps=6, backend=backend)
    return [], [out.detach(), *torch.autograd.grad(out, seeds, randn(3, 5, h, w)[order])]


def radius_mask(order, backend):
    logits = leaf(randn(3, 90, 90)[order])
    out = kernels.radius_mask(logits, (9, 10), 2.5, backend=backend)
    return [], [out.detach(), *torch.autograd.grad(out, logits, randn(3, 90, 90)[order])]


def dilate_regions(order, backend):
    return [], [kernels.dilate_regions(rand(3, 20, 30, 70)[order] < 0.02, 5.0, backend=backend)]


def select_regions(order, backend):
    logits, scores = randn(3, 90, 90)[order], rand(3, 90, 12)[order]
    present = torch.arange(12).expand(3, 12) < 4  # as many pairs for each image
    out = kernels.select_regions(logits, scores, present, grid=(9, 10), radius=3.0, backend=backend)
    return [], [x.unflatten(0, (3, 4)) for x in (out.members, out.seeds)]


def max_upsampled_masks(order, backend):
    logits = leaf(randn(3, 90, 90)[order])
    pairs = torch.stack([torch.arange(3).repeat_interleave(2), torch.arange(6)], 1)
    members = (rand(3, 2, 90) < 0.3)[order].flatten(0, 1)
    selection = kernels.RegionSelection(pairs, members, None)
    out = kernels.max_upsampled_masks(logits, selection, grid=(9, 10), size=(70, 83), radius=4.0, backend=backend)
    flow = randn(3, 2, 70, 83)[order].flatten(0, 1)
    return [], [out.detach().unflatten(0, (3, 2)), *torch.autograd.grad(out, logits, flow)]


def patch_token_contrast(order, backend):
    tokens, labels = leaf(randn(3, 150, 48)[order]), (rand(3, 150) * 4).long()[order]
    value = kernels.patch_token_contrast(tokens, labels, backend=backend)
    return [value.detach()], [*torch.autograd.grad(value, tokens)]


def class_patch_contrast(order, backend):
    classes, patches = leaf(randn(3, 7, 48)[order]), randn(3, 150, 48)[order]
    labels, present = (rand(3, 150) * 8).long()[order], (rand(3, 7) < 0.6)[order]
    value = kernels.class_patch_contrast(classes, patches, labels, present, backend=backend)
    return [value.detach()], [*torch.autograd.grad(value, classes)]


def path_affinity_loss(order, backend):
    h, w = (15, 35) if backend == "reference" else (50, 140)  # every pair of pixels and its paths, gathered
    logits, labels = leaf(randn(3, 1, h, w)[order]), (rand(3, h, w) * 3).long()[order]
    value = kernels.path_affinity_loss(logits, labels, radius=4, ignore_index=2, backend=backend)
    return [value.detach()], [*torch.autograd.grad(value, logits)]


def path_affinity_counts(order, backend):
    labels = (rand(3, 50, 140) * 3).long()[order]
    own = [kernels.path_affinity_counts(x, radius=4, ignore_index=2, backend=backend) for x in labels.split(1)]
    return [kernels.path_affinity_counts(labels, radius=4, ignore_index=2, backend=backend)], [torch.stack(own)]


def psl_loss(order, backend):
    logits = leaf(3 * randn(3, 5, 100, 130)[order])
    labels, present = (rand(3, 100, 130) * 6).long()[order], (rand(3, 4) < 0.6)[order]
    out = kernels.psl_loss(logits, rand(3, 4)[order], labels, present, ignore_index=5, backend=backend)
    grads = torch.autograd.grad((out.labelled + out.online).sum(), logits)
    return [], [*(x.detach() for x in out), *grads]


def erase_soft(order, backend):
    images, maps = picture(41, 53)[order], leaf(randn(3, 9, 10)[order])
    out = kernels.erase_soft(images, maps, backend=backend)
    return [], [out.detach(), *torch.autograd.grad(out, maps, randn(3, 3, 41, 53)[order])]


def erase_hard(order, backend):
    images, maps = picture(41, 53)[order], randn(3, 9, 10)[order]
    return [], [kernels.erase_hard(images, maps, backend=backend)]


def c2am_pool(order, backend):
    features, logits = leaf(randn(3, 150, 9, 10)[order]), leaf(rand(3, 1, 9, 10)[order])
    out = kernels.c2am_pool(features, logits, backend=backend)
    grads = torch.autograd.grad(out, (features, logits), list(randn(3, 2, 150)[order].unbind(1)))
    return [], [*(x.detach() for x in out), *grads]


CASES = {
    "c2am_pool": c2am_pool,
    "class_patch_contrast": class_patch_contrast,
    "dense_crf": dense_crf,
    "dense_crf, pruned": lambda order, backend: dense_crf(order, backend, prune=1e-3),
    "dense_crf, padded": lambda order, backend: dense_crf(
        order, backend, sizes=[[(72, 80), (40, 71), (72, 33)][i] for i in order]
    ),
    "dense_energy": dense_energy,
    "dilate_regions": dilate_regions,
    "erase, soft": erase_soft,
    "erase, hard": erase_hard,
    "max_upsampled_masks": max_upsampled_masks,
    "par": par,
    "patch_token_contrast": patch_token_contrast,
    "path_affinity_counts": path_affinity_counts,
    "path_affinity_loss": path_affinity_loss,
    "psl_loss": psl_loss,
    "radius_mask": radius_mask,
    "random_walk": random_walk,
    "select_regions": select_regions,
}


BACKENDS = [(case, backend) for case in CASES for backend in available_backends(case.split(",")[0], "cpu")]


def steady(case, backend):
    return backend != "reference" or case in STEADY_REFERENCES


def digest(*tensors):
    total = hashlib.sha256()
    for x in tensors:
        total.update(str(x.dtype).encode() + x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@pytest.fixture
def on_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_every_op_is_here():
    assert {case.split(",")[0] for case in CASES} == {*AUTO}


@pytest.mark.skipif("native" not in available_backends("par"), reason="kernels._C is not built")
@pytest.mark.parametrize("threads", [1, 2])
def test_native_code_runs_on_the_threads_of_torch(threads, on_threads):
    from kernels import _C

    on_threads(threads)
    assert _C.threads_in_use() == threads  # or equal bits on one and on two threads would mean nothing


@pytest.mark.parametrize(("case", "backend"), BACKENDS)
def test_runs_and_threads(case, backend, on_threads):
    found = set()
    for threads in (1, 2) if steady(case, backend) else (1,):
        on_threads(threads)
        for _ in range(RUNS):
            whole, own = CASES[case](ORDERS[0], backend)
            found.add(digest(*whole, *own))
    assert len(found) == 1


@pytest.mark.parametrize(("case", "backend"), [pair for pair in BACKENDS if steady(*pair)])
def test_batch_position(case, backend, on_threads):
    found = set()
    for threads in (1, 2):
        on_threads(threads)
        for order in ORDERS:
            _, own = CASES[case](order, backend)
            found.add(digest(*(x[order.index(0)] for x in own)))
    assert len(found) == 1


def test_different_samples_differ():
    """The digests are of values, not of nothing."""
    for case, build in CASES.items():
        _, own = build(ORDERS[0], "reference")
        assert all(x.shape[0] == 3 for x in own), case
        assert len({digest(*(x[i] for x in own)) for i in range(3)}) == 3, case
