"""Every op on a CUDA device against the same op on the CPU (par has its own tests of the CUDA kernels)."""

import pytest
import torch

import kernels

GRID = (5, 6)


def contrast(d):
    tokens, labels = torch.randn(2, 30, 8), torch.randint(0, 3, (2, 30))
    ours = kernels.patch_token_contrast(tokens.to(d), labels.to(d))
    z, present = torch.randn(2, 2, 8), torch.ones(2, 2)
    return [ours, kernels.class_patch_contrast(z.to(d), tokens.to(d), labels.to(d), present.to(d))]


def regions(d):
    logits, scores = torch.randn(2, 30, 30).to(d).requires_grad_(), torch.rand(2, 30, 3).to(d)
    chosen = kernels.select_regions(logits, scores, torch.ones(2, 3, device=d), grid=GRID, radius=2.0)
    maps = kernels.max_upsampled_masks(logits, chosen, grid=GRID, size=(40, 50), radius=2.0)
    maps.square().sum().backward()
    return [*(x.float() for x in chosen), maps.detach(), logits.grad]


def discs(d):
    logits, seeds = torch.randn(1, 30, 30).to(d), torch.rand(1, 3, 5, 6) < 0.1
    return [kernels.radius_mask(logits, GRID, 1.5), kernels.dilate_regions(seeds.to(d), 1.5).float()]


def fields(d):
    probs = torch.randn(1, 3, 16, 20, dtype=torch.float64).softmax(1).to(d).requires_grad_()
    image = (torch.rand(1, 3, 16, 20, dtype=torch.float64) * 255).to(d)
    roi, labels = torch.ones(1, 16, 20).to(d), torch.full((1, 16, 20), 255).to(d)
    energies = [kernels.dense_energy(probs, image, roi, labels, scale=s) for s in ("lattice", "true")]
    sum(energies).backward()
    crf = [kernels.dense_crf(-probs.detach().log(), image, mode=m) for m in ("fast", "ring", "exact")]
    return [*(1e5 * e.detach() for e in energies), 1e5 * probs.grad, *crf]


def paths(d):
    logits, labels = torch.randn(2, 1, 20, 30).to(d).requires_grad_(), torch.randint(0, 3, (2, 20, 30)).to(d)
    counts = kernels.path_affinity_counts(labels)
    loss = kernels.path_affinity_loss(logits, labels, counts=counts + 5)
    loss.backward()
    return [counts.float(), loss, 1e3 * logits.grad]


def prohibited(d):
    logits, labels = torch.randn(2, 5, 20, 30).to(d).requires_grad_(), torch.randint(0, 5, (2, 20, 30)).to(d)
    out = kernels.psl_loss(logits, torch.rand(2, 4).to(d), labels, torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1]]).to(d))
    (out.labelled + out.online).sum().backward()
    return [*(x.float() for x in out), 1e3 * logits.grad]


def masks(d):
    images, maps = torch.randn(2, 3, 33, 50).to(d), torch.randn(2, 5, 6).to(d).requires_grad_()
    out = kernels.erase_soft(images, maps)
    return [out, *torch.autograd.grad(out.square().sum(), maps), kernels.erase_hard(images, maps)]


def vectors(d):
    leaves = [torch.rand(6, 40, 5, 6).to(d).requires_grad_(), torch.randn(6, 1, 5, 6).to(d).requires_grad_()]
    terms = kernels.c2am_contrast(*kernels.c2am_pool(*leaves))
    return [*terms, *torch.autograd.grad(sum(terms), leaves)]


CASES = [contrast, regions, discs, fields, paths, prohibited, masks, vectors]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_equals_the_cpu_and_repeats(case):
    results = []
    for device in ("cpu", "cuda", "cuda"):
        torch.manual_seed(1)
        results.append([x.detach().cpu() for x in case(device)])
    for cpu, first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, cpu, rtol=1e-5, atol=1e-6)  # fp32 sums in another order


@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_the_cases_run_on_the_cpu(case):
    assert all(torch.isfinite(x).all() for x in case("cpu"))
