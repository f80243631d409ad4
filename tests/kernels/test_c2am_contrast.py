"""c2am_contrast: the golden values of P-NOC, a loop over the pairs, the ranks, the gradients."""

import math

import pytest
import torch

from kernels import available_backends, c2am_contrast
from kernels.c2am_contrast import bench, reference

FOREGROUND = torch.tensor([[1, 0, 0.2], [0.8, 0.3, 0.1], [0.1, 1, 0.5]])
BACKGROUND = torch.tensor([[0.1, 0.2, 1], [0, 0.4, 0.9], [0.5, 0.5, 0.5]])


def test_pnoc_check_4():
    values = [x.item() for x in c2am_contrast(FOREGROUND, BACKGROUND)]
    assert values == pytest.approx([0.4770383, 0.1143249, 0.8965838], abs=1.5e-7)  # seven decimals are given


def by_hand(foreground, background, alpha):
    """The three terms pair by pair, float64."""

    def s(u, v):
        return min(max((torch.dot(u, v) / (u.norm() * v.norm())).item(), 0.0005), 0.9995)

    def pull(vectors):
        total = 0.0
        for u in vectors:
            row = [s(u, v) for v in vectors]
            order = sorted(range(len(row)), key=lambda j: -row[j])  # keeps the order of those that tie
            for rank, j in enumerate(order, start=-1):
                total += math.exp(-alpha * rank) * max(0.0, -math.log(row[j]))
        return total / len(vectors) ** 2

    push = sum(-math.log(1 - s(b, f)) for b in background for f in foreground)
    return pull(foreground), pull(background), push / len(foreground) ** 2


@pytest.mark.parametrize(("b", "d", "alpha"), [(1, 3, 0.25), (5, 4, 0.25), (9, 2, 1.0), (8, 16, 0.0)])
def test_equals_the_pairs(b, d, alpha):
    vectors = torch.randn(2, b, d, dtype=torch.float64)
    got = torch.stack(c2am_contrast(*vectors, alpha=alpha))
    assert got.tolist() == pytest.approx(by_hand(*vectors, alpha), rel=1e-12)


def test_ranks():
    s = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.7, 0.7], [0.2, 0.5, 0.5]])
    assert reference.ranks(s).tolist() == [[1, -1, 0], [-1, 0, 1], [1, -1, 0]]
    many = torch.randint(0, 9, (40, 300)).float()  # long enough for another sort than that of short rows
    above = (many[:, :, None] < many[:, None, :]).sum(2)
    before = torch.stack([(many[:, :j] == many[:, j : j + 1]).sum(1) for j in range(300)], 1)
    assert torch.equal(reference.ranks(many), above + before - 1)


def test_clipped_entries_and_ranks_have_no_gradient():
    u = torch.tensor([[1.0, 0], [0, 1], [-1, 0]], requires_grad=True)  # cosines 1, 0 and -1 are all clipped
    for term in c2am_contrast(u, u):
        (grad,) = torch.autograd.grad(term, u, retain_graph=True)
        assert not grad.any()
    u = torch.tensor([[1.0, 0], [0.6, 0.8], [-1, 0]], dtype=torch.float64, requires_grad=True)
    first, second, push = c2am_contrast(u, u.detach())
    (grad,) = torch.autograd.grad(first, u)
    # Each of the rows 0 and 1 has the other as its neighbour of rank 0, weight 1: -2/9 ln cos(u_0, u_1). Row 2 sees
    # clipped ones alone.
    v = u.detach().clone().requires_grad_()
    (want,) = torch.autograd.grad(-2 / 9 * torch.cosine_similarity(v[0], v[1], dim=0).log(), v)
    torch.testing.assert_close(grad, want)
    assert grad[:2].abs().sum() > 0 and not grad[2].any() and not second.requires_grad and push.requires_grad


def test_gradcheck():
    vectors = torch.rand(2, 5, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: c2am_contrast(*v), vectors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half(dtype):
    vectors = torch.rand(2, 5, 4).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.stack(c2am_contrast(*vectors))
    assert got.dtype == torch.float32 and torch.equal(got, torch.stack(c2am_contrast(*vectors.float())))
    (grad,) = torch.autograd.grad(got.sum(), vectors)
    assert grad.dtype == dtype and grad.isfinite().all()


def test_zero_vectors_and_layouts():
    zero = torch.zeros(4, 3, requires_grad=True)
    got = c2am_contrast(zero, zero)
    (grad,) = torch.autograd.grad(sum(got), zero)
    assert all(x.isfinite() for x in got) and grad.isfinite().all()
    vectors = torch.randn(2, 5, 4)
    turned = torch.stack(c2am_contrast(*vectors.mT.contiguous().mT))
    # sums along the other side of a matrix, in another order on some CPUs
    torch.testing.assert_close(turned, torch.stack(c2am_contrast(*vectors)), rtol=1e-6, atol=0)


def test_compile_fullgraph():
    vectors = torch.rand(2, 5, 4, requires_grad=True)
    run = torch.compile(lambda v: torch.stack(c2am_contrast(*v)), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(vectors), torch.stack(c2am_contrast(*vectors)))


def test_errors():
    for vectors, options, match in (
        ((torch.ones(3), torch.ones(3)), {}, r"foreground must be \[B, D\], got \(3,\)"),
        ((torch.ones(3, 2), torch.ones(2, 2)), {}, r"background must be \[3, 2\], got \(2, 2\)"),
        ((torch.ones(0, 2), torch.ones(0, 2)), {}, "foreground must be .* with B >= 1, got none"),
        ((torch.ones(3, 2), torch.ones(3, 2)), {"alpha": -1.0}, r"alpha must lie in \[0.0, inf\], got -1.0"),
        ((torch.ones(3, 2), torch.ones(3, 2)), {"backend": "native"}, "it has no native implementation"),
    ):
        with pytest.raises(ValueError, match="c2am_contrast: .*" + match):
            c2am_contrast(*vectors, **options)
    with pytest.raises(TypeError, match="c2am_contrast: foreground must be floating point"):
        c2am_contrast(torch.ones(3, 2).long(), torch.ones(3, 2))
    assert available_backends("c2am_contrast") == ["reference"]


def test_the_benchmark_peers_agree(monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", {"tiny": (6, 8)})
    cpu = torch.device("cpu")
    peers = bench.peers("tiny", cpu)
    assert bench.peer_error("tiny", cpu, "eager", peers["eager"]()) <= bench.PEER_TOLERANCE
    assert peers["products alone"]() is None
