"""random_walk: the reference against the dense matrix, every backend against the reference."""

import functools

import pytest
import torch

from kernels import available_backends, random_walk
from kernels.random_walk import reference

CPU_BACKENDS = available_backends("random_walk", "cpu")
native = pytest.mark.skipif("native" not in CPU_BACKENDS, reason="kernels._C is not built")


@functools.cache
def edge_map(kind, h, w, batch=1):
    """[batch, h, w] float32: smooth hills, sharp outlines of boxes, noise, all zero or all one."""
    make = torch.Generator().manual_seed(3)
    if kind == "smooth":
        coarse = torch.rand(batch, 1, 4, 5, generator=make)
        return torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear")[:, 0] * 0.4
    if kind == "sharp":
        boxes = torch.rand(batch, 1, 3, 4, generator=make)
        boxes = torch.nn.functional.interpolate(boxes, (h, w), mode="nearest")[:, 0]
        edges = torch.zeros(batch, h, w)
        edges[:, 1:] = (boxes[:, 1:] != boxes[:, :-1]).float()
        edges[:, :, 1:] += (boxes[:, :, 1:] != boxes[:, :, :-1]).float()
        return edges.clamp(max=1) * (0.7 + 0.3 * torch.rand(batch, h, w, generator=make))
    return {"noise": torch.rand(batch, h, w, generator=make), "none": torch.zeros(batch, h, w)}.get(
        kind, torch.ones(batch, h, w)
    )


def seed_maps(b, c, h, w):
    """Smooth scores with large regions at 0, as class activation maps have."""
    coarse = torch.rand(b, c, 4, 5) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (h, w), mode="bicubic", align_corners=True).clamp(0, 1)


def one(edges, radius, beta):
    """The matrix T [N, N] of one image, float64, straight from the definition, pair by pair."""
    h, w = edges.shape
    rows, columns = (x.flatten() for x in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    values = edges.double()
    a = torch.eye(h * w, dtype=torch.float64)
    for dy in range(radius):
        for dx in range(1 - radius, radius):
            if dy * dy + dx * dx >= radius**2 or (dy == 0 and dx <= 0):
                continue
            fits = (rows + dy < h) & (columns + dx >= 0) & (columns + dx < w)
            y, x = rows[fits], columns[fits]
            highest = torch.zeros(len(y), dtype=torch.float64)
            for py in range(dy + 1):
                for px in range(min(dx, 0), max(dx, 0) + 1):
                    if abs(dy * px - dx * py) / (dy * dy + dx * dx) ** 0.5 < 1 - 1e-12:  # distance to the line
                        highest = torch.maximum(highest, values[y + py, x + px])
            i, j = y * w + x, (y + dy) * w + x + dx
            a[i, j] = a[j, i] = 1 - highest
    a = a**beta
    return a / a.sum(0, keepdim=True)


@functools.cache
def dense(kind, h, w, radius, beta, log2_steps):
    """T^(2^t) by squaring, float64."""
    if log2_steps == 0:
        return one(edge_map(kind, h, w)[0], radius, beta)
    half = dense(kind, h, w, radius, beta, log2_steps - 1)
    return half @ half


def dense_walk(seeds, kind, radius=5, beta=10.0, log2_steps=8):
    _, c, h, w = seeds.shape
    matrix = dense(kind, h, w, radius, beta, log2_steps)
    return (seeds.double().reshape(c, h * w) @ matrix).reshape(1, c, h, w)


def error(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


class TestGolden:
    """Section 15 of the notes on the method: numbers found with the published code."""

    y, x = torch.meshgrid(torch.arange(6.0).double(), torch.arange(7.0).double(), indexing="ij")
    edges = ((3 * y + 5 * x) % 7 / 10)[None]
    cams = torch.stack([torch.exp(-((y - 1) ** 2 + (x - 1) ** 2) / 4), torch.exp(-((y - 4) ** 2 + (x - 5) ** 2) / 6)])
    seeds = (cams * (1 - edges))[None]

    def test_geometry(self):
        for radius, directions, cells in ((5, 34, 242), (10, 152, 2134)):
            offsets = reference.offsets(radius)
            lengths = [len(reference.path(*d)) for d in offsets]
            assert (len(offsets), sum(lengths), min(lengths)) == (directions, cells, 2)
        assert set(reference.path(1, 1)) == {(0, 0), (0, 1), (1, 0), (1, 1)}
        assert len(reference.path(2, -1)) == 6 and len(reference.path(4, 2)) == 11
        assert max(len(reference.path(*d)) for d in reference.offsets(5)) == 11
        assert max(len(reference.path(*d)) for d in reference.offsets(10)) == 22

    def test_affinities(self):
        plain = reference.affinities(self.edges, 5, 1.0)[0, 0]
        for y, x, value in ((0, 1, 0.5), (1, 1, 0.5), (2, 3, 0.4)):
            assert abs(plain[0, 0, 4 + y, 4 + x] - value) < 1e-12 and abs(plain[y, x, 4 - y, 4 - x] - value) < 1e-12
        z = reference.degrees(reference.affinities(self.edges, 5, 10.0))
        assert abs(z[0, 0, 0, 0].item() - 1.0347032) < 5e-8

    @pytest.mark.parametrize("method", ["stepped", "chebyshev"])
    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_walk(self, backend, method):
        seeds = self.seeds if backend == "reference" else self.seeds.float()
        edges = self.edges.to(seeds.dtype)
        rows = [
            (1, 0, 0, [0.600581, 0.389436, 0.414544, 0.264974, 0.033880, 0.009450, 0.002543]),
            (8, 0, 0, [0.276379, 0.257230, 0.201214, 0.191246, 0.110640, 0.119827, 0.114454]),
            (8, 1, 5, [0.105170, 0.115368, 0.252163, 0.275296, 0.274288, 0.311836, 0.304084]),
        ]
        for t, c, row, want in rows:
            got = random_walk(seeds, edges, log2_steps=t, method=method, backend=backend)[0, c, row].double()
            # half of the sixth decimal; fp32 adds 2e-7
            assert (got - torch.tensor(want, dtype=torch.float64)).abs().max() < 5.1e-7 + 2e-7 * (backend == "native")

    def test_columns_of_the_matrix_sum_to_one(self):
        total = one(self.edges[0], 5, 10.0).sum(0)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("kind", ["smooth", "sharp", "noise"])
def test_against_the_dense_matrix(kind, backend):
    seeds = seed_maps(1, 2, 32, 40)
    for t in range(1, 9) if backend == "native" else (2, 7):
        want = dense_walk(seeds, kind, log2_steps=t)
        for method in ("stepped", "chebyshev"):
            got = random_walk(seeds, edge_map(kind, 32, 40), log2_steps=t, method=method, backend=backend)
            assert error(got, want) < 1e-5, (t, method)  # fp32; the project asks for 1e-4
            if backend == "reference":
                exact = random_walk(
                    seeds.double(), edge_map(kind, 32, 40), log2_steps=t, method=method, backend="reference"
                )
                assert error(exact, want) < (1e-7 if method == "chebyshev" else 1e-12), (t, method)


@native
@pytest.mark.parametrize(("radius", "beta"), [(3, 1.0), (5, 20.0), (7, 4.5), (10, 1.0), (10, 20.0)])
@pytest.mark.parametrize("kind", ["smooth", "sharp"])
def test_radius_and_beta(kind, radius, beta):
    seeds = seed_maps(1, 3, 17, 22)
    for t in (3, 7, 8):
        want = dense_walk(seeds, kind, radius, beta, t)
        for method in ("stepped", "chebyshev"):
            got = random_walk(
                seeds, edge_map(kind, 17, 22), radius=radius, beta=beta, log2_steps=t, method=method, backend="native"
            )
            assert error(got, want) < 1e-5, (t, method)


@pytest.mark.parametrize("log2_steps", [6, 8, 10, 12, 16])
def test_series_is_the_power(log2_steps):
    """sum c_k T_k(x) = x^n on [-1, 1] up to the cut, from the tails alone."""
    x = torch.cat([torch.linspace(-1, 1, 1001, dtype=torch.float64), 1 - 10 ** -torch.linspace(1, 9, 99).double()])
    tails = reference.series_tails(log2_steps, 5)
    assert 2 * len(tails) == reference.series_degree(log2_steps, 5) < 2**log2_steps
    k = torch.arange(2 * len(tails) + 1, dtype=torch.float64)
    t = torch.cos(k[:, None] * torch.acos(x))
    total = t[0] + sum(tail * (t[2 * m + 2] - t[2 * m]) for m, tail in enumerate(tails))
    bound = reference.TRUNCATION / (1 + 2 * len(reference.offsets(5))) ** 0.5
    assert (total - x ** (2**log2_steps)).abs().max() < bound
    assert reference.series_tails(5, 5) == []  # 32 steps are fewer than the series would have


@native
@pytest.mark.parametrize("kind", ["none", "smooth", "sharp"])
def test_a_single_seed(kind):
    """The result is ten thousand times smaller than the seed, and still right to 1e-4 of its maximum."""
    seeds = torch.zeros(1, 1, 64, 64)
    seeds[..., 30, 33] = 1.0
    edges = edge_map(kind, 64, 64)
    want = random_walk(seeds.double(), edges, method="stepped", backend="reference")
    for method in ("stepped", "chebyshev"):
        assert error(random_walk(seeds, edges, method=method, backend="native"), want) < 1e-4


@pytest.mark.parametrize("method", ["stepped", "chebyshev"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
class TestEachBackend:
    def test_weighted_means(self, backend, method):
        """Constants stay, to the bit; nothing leaves the range of the seeds; equal maps stay equal."""
        edges = edge_map("sharp", 19, 23)
        constant = torch.full((1, 2, 19, 23), 0.7)
        assert torch.equal(random_walk(constant, edges, method=method, backend=backend), constant)
        seeds = seed_maps(1, 1, 19, 23)
        for channels in (1, 2, 3, 4, 5, 7, 13, 20) if backend == "native" else (3,):
            out = random_walk(seeds.expand(1, channels, 19, 23), edges, method=method, backend=backend)
            assert torch.equal(out, out[:, :1].expand_as(out))
            # the series may overshoot by its cut
            assert out.min() >= seeds.min() - 1e-6 and out.max() <= seeds.max() + 1e-6
            assert out.std() < seeds.std()

    def test_mass_by_degree_is_kept(self, backend, method):
        """T_ij z_j is symmetric, so sum_j z_j y_j = sum_j z_j x_j, while sum_j y_j is not kept."""
        edges = edge_map("noise", 19, 23)
        z = reference.degrees(reference.affinities(edges.double(), 5, 10.0))
        seeds = seed_maps(1, 2, 19, 23)
        out = random_walk(seeds, edges, method=method, backend=backend)
        before, after = ((z * x.double()).sum((2, 3)) for x in (seeds, out))
        torch.testing.assert_close(after, before, rtol=3e-6, atol=0)
        assert ((out.sum((2, 3)) / seeds.sum((2, 3)) - 1).abs() > 1e-4).all()

    def test_isolated_pixels_and_radius_1(self, backend, method):
        seeds = seed_maps(2, 2, 9, 11)
        isolated = random_walk(seeds, torch.ones(2, 9, 11), method=method, backend=backend)
        assert torch.equal(isolated, seeds)
        assert torch.equal(random_walk(seeds, torch.zeros(2, 9, 11), radius=1, method=method, backend=backend), seeds)
        edges = torch.zeros(1, 9, 11)
        edges[:, 4, 5] = 1.0
        out = random_walk(seeds[:1], edges, method=method, backend=backend)
        assert torch.equal(out[..., 4, 5], seeds[:1, :, 4, 5]) and not torch.equal(out[..., 4, 4], seeds[:1, :, 4, 4])

    def test_adjoint(self, backend, method):
        edges = edge_map("noise", 19, 23, 2)
        x, y = torch.rand(2, 3, 19, 23, requires_grad=True), torch.rand(2, 3, 19, 23)
        out = random_walk(x, edges, method=method, log2_steps=6, backend=backend)
        (grad,) = torch.autograd.grad(out, x, y)
        left, right = (out.detach().double() * y).sum(), (x.detach().double() * grad).sum()
        assert abs(left / right - 1) < 1e-6
        assert grad.shape == x.shape and not torch.allclose(grad, random_walk(y, edges, log2_steps=6))

    def test_layouts(self, backend, method):
        seeds, edges = seed_maps(2, 3, 14, 18), edge_map("noise", 14, 18, 2)
        want = random_walk(seeds, edges, method=method, backend=backend)
        last = seeds.contiguous(memory_format=torch.channels_last)
        got = random_walk(last, edges.mT.contiguous().mT, method=method, backend=backend)
        assert torch.equal(got, want)
        strided = torch.stack([seeds, -seeds], dim=-1)[..., 0]
        assert torch.equal(random_walk(strided, edges, method=method, backend=backend), want)
        alone = random_walk(seeds[1:], edges[1:], method=method, backend=backend)
        if backend == "reference":
            torch.testing.assert_close(alone, want[1:], rtol=0, atol=1e-6)  # torch rounds by the size of the loop
        else:
            assert torch.equal(alone, want[1:])

    def test_empty(self, backend, method):
        for shape in ((0, 2, 4, 4), (1, 0, 4, 4), (1, 2, 0, 4), (1, 2, 4, 0)):
            edges = torch.zeros(shape[0], *shape[2:])
            assert random_walk(torch.zeros(shape), edges, method=method, backend=backend).shape == shape

    @pytest.mark.parametrize("size", [(1, 30), (30, 1), (1, 1), (2, 3), (3, 33)])
    def test_small_grids(self, backend, method, size):
        """Also radii that reach over the whole grid."""
        seeds = seed_maps(1, 2, *size) + 0.1
        for radius in (2, 5, 16):
            want = dense_walk(seeds, "smooth", radius, 3.0, 6)
            got = random_walk(
                seeds, edge_map("smooth", *size), radius=radius, beta=3, log2_steps=6, method=method, backend=backend
            )
            assert error(got, want) < 3e-6

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half(self, backend, method, dtype):
        seeds, edges = seed_maps(1, 2, 12, 13).to(dtype), edge_map("noise", 12, 13).to(dtype)
        got = random_walk(seeds, edges, method=method, backend=backend)
        assert got.dtype == torch.float32
        assert torch.equal(got, random_walk(seeds.float(), edges.float(), method=method, backend=backend))
        leaf = seeds.clone().requires_grad_()
        random_walk(leaf, edges, method=method, log2_steps=5, backend=backend).sum().backward()
        assert leaf.grad.dtype == dtype and torch.isfinite(leaf.grad).all()

    def test_no_steps_is_one_step(self, backend, method):
        seeds = seed_maps(1, 1, 9, 11)
        got = random_walk(seeds, edge_map("smooth", 9, 11), log2_steps=0, method=method, backend=backend)
        assert error(got, dense_walk(seeds, "smooth", log2_steps=0)) < 1e-6

    def test_inputs_are_untouched_and_runs_repeat(self, backend, method):
        seeds, edges = seed_maps(1, 2, 8, 9), edge_map("noise", 8, 9).clone()
        before = seeds.clone(), edges.clone()
        first = random_walk(seeds, edges, method=method, backend=backend)
        assert torch.equal(first, random_walk(seeds, edges, method=method, backend=backend))
        assert torch.equal(seeds, before[0]) and torch.equal(edges, before[1])

    def test_edges_get_no_gradient(self, backend, method):
        edges = edge_map("noise", 8, 9).clone().requires_grad_()
        assert not random_walk(seed_maps(1, 1, 8, 9), edges, method=method, backend=backend).requires_grad

    def test_compile_fullgraph(self, backend, method):
        seeds, edges = seed_maps(1, 2, 8, 9).requires_grad_(), edge_map("noise", 8, 9)
        options = {"radius": 2, "log2_steps": 1 if backend == "reference" else 6, "method": method, "backend": backend}
        run = torch.compile(lambda s, e: random_walk(s, e, **options) * 2, fullgraph=True, backend="aot_eager")
        want, got = random_walk(seeds, edges, **options) * 2, run(seeds, edges)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
        grads = [torch.autograd.grad(out.square().sum(), seeds)[0] for out in (want, got)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("log2_steps", [2, 6])  # 2: steps, 6: the series
def test_gradcheck(log2_steps):
    seeds = torch.rand(1, 1, 2, 4, dtype=torch.float64, requires_grad=True)
    edges = torch.rand(1, 2, 4, dtype=torch.float64)
    run = functools.partial(random_walk, edges=edges, radius=3, beta=2.0, log2_steps=log2_steps, backend="reference")
    assert torch.autograd.gradcheck(run, (seeds,))


@native
@pytest.mark.parametrize("method", ["stepped", "chebyshev"])
def test_native_gradient_equals_reference(method):
    edges, weight = edge_map("sharp", 15, 21, 2), torch.randn(2, 3, 15, 21)
    seeds = torch.rand(2, 3, 15, 21)
    grads = []
    for backend, dtype in (("native", torch.float32), ("reference", torch.float64)):
        leaf = seeds.to(dtype).requires_grad_()
        out = random_walk(leaf, edges, log2_steps=6, method=method, backend=backend)
        grads += torch.autograd.grad((out * weight).sum(), leaf)
    assert error(*grads) < 3e-6


@native
def test_second_derivative_of_native():
    seeds = torch.rand(1, 1, 6, 7, requires_grad=True)
    edges, y = edge_map("noise", 6, 7), torch.rand(1, 1, 6, 7)
    out = random_walk(seeds, edges, log2_steps=2, backend="native").square()
    (grad,) = torch.autograd.grad((out * y).sum(), seeds, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), seeds)  # 2 A^T (y * A 1), and A 1 = 1
    (want,) = torch.autograd.grad((random_walk(seeds, edges, log2_steps=2, backend="native") * 2 * y).sum(), seeds)
    torch.testing.assert_close(second, want, rtol=1e-5, atol=1e-6)


@native
def test_threads_change_no_bit():
    threads = torch.get_num_threads()
    seeds, edges = seed_maps(3, 5, 40, 33), edge_map("noise", 40, 33, 3)
    try:
        results = []
        for count in (1, 2, 4):  # 4: row bands; 1, 2: whole images
            torch.set_num_threads(count)
            both = [random_walk(s, edges[: len(s)], backend="native") for s in (seeds, seeds[:1])]
            assert torch.equal(both[0][:1], both[1])
            results.append(both[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@native
@pytest.mark.parametrize("radius", [1, 2, 5, 10])
@pytest.mark.parametrize("size", [(1, 1), (1, 30), (30, 1), (7, 3), (9, 17), (12, 66)])
def test_any_number_of_maps(size, radius):
    """Up to 3 maps lie in memory by other rules than more do."""
    seeds, edges = seed_maps(1, 29, *size) + 0.1, edge_map("noise", *size)
    for method in ("stepped", "chebyshev"):
        run = functools.partial(random_walk, edges=edges, radius=radius, beta=3.0, log2_steps=6, method=method)
        want = run(seeds.double(), backend="reference")
        for channels in (1, 3, 4, 9, 20, 29):
            leaf = seeds[:, :channels].clone().requires_grad_()
            got = run(leaf, backend="native")
            assert error(got, want[:, :channels]) < 3e-6, (channels, method)
        total = reference.degrees(reference.affinities(edges.double(), radius, 3.0))
        (grad,) = torch.autograd.grad(got, leaf, total.float().expand_as(got))  # z_i T_ij = z_j T_ji
        assert error(grad, total.expand_as(grad)) < 3e-6


@native
def test_poisoned_memory():
    seeds, edges = seed_maps(1, 3, 21, 37), edge_map("noise", 21, 37)
    want = random_walk(seeds, edges, backend="native")
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)  # fills every fresh tensor with NaN
        assert torch.empty(3).isnan().all()
        assert torch.equal(want, random_walk(seeds, edges, backend="native"))
    finally:
        torch.use_deterministic_algorithms(before)


@native
@pytest.mark.parametrize("tails", [[], [0.4, 0.1]])
def test_opcheck(tails):
    for transposed in (False, True):
        seeds = seed_maps(2, 3, 8, 9).requires_grad_()
        args = (seeds, edge_map("noise", 8, 9, 2), 3, 10.0, 4, tails, transposed)
        torch.library.opcheck(torch.ops.wsss.random_walk.default, args)


@native
def test_direct_call_is_checked():
    op, seeds, edges = torch.ops.wsss.random_walk, torch.rand(1, 2, 4, 5), torch.rand(1, 4, 5)
    with pytest.raises(TypeError, match="random_walk: seeds must be float32"):
        op(seeds.double(), edges, 5, 10.0, 4, [], False)
    with pytest.raises(ValueError, match="random_walk: edges must have 3 dimensions"):
        op(seeds, seeds, 5, 10.0, 4, [], False)
    with pytest.raises(ValueError, match="random_walk: edges .* do not fit seeds"):
        op(seeds, edges[..., :4], 5, 10.0, 4, [], False)
    for radius, beta, steps, match in ((0, 1.0, 1, "rad"), (17, 1.0, 1, "rad"), (5, 0.0, 1, "be"), (5, 1.0, -1, "st")):
        with pytest.raises(ValueError, match=f"random_walk: {match}"):
            op(seeds, edges, radius, beta, steps, [], False)


@native
def test_native_refuses_float64():
    with pytest.raises(TypeError, match="random_walk: the native backend computes in fp32"):
        random_walk(torch.rand(1, 2, 4, 4).double(), torch.rand(1, 4, 4), backend="native")


@pytest.mark.parametrize(
    ("seeds", "edges", "options", "match"),
    [
        ((2, 4, 8), (2, 4, 8), {}, r"random_walk: seeds must be \[B, C, h, w\], got \(2, 4, 8\)"),
        ((1, 1, 4, 8), (1, 1, 4, 8), {}, r"random_walk: edges must be \[1, 4, 8\], got \(1, 1, 4, 8\)"),
        ((1, 1, 4, 8), (1, 4, 7), {}, r"random_walk: edges must be \[1, 4, 8\], got \(1, 4, 7\)"),
        ((1, 1, 4, 8), (1, 4, 8), {"radius": 0}, r"random_walk: radius must be an integer in \[1, 16\], got 0"),
        ((1, 1, 4, 8), (1, 4, 8), {"radius": 17}, "random_walk: radius must be an integer"),
        ((1, 1, 4, 8), (1, 4, 8), {"radius": 2.5}, "random_walk: radius must be an integer"),
        ((1, 1, 4, 8), (1, 4, 8), {"log2_steps": -1}, r"log2_steps must be an integer in \[0, 16\], got -1"),
        ((1, 1, 4, 8), (1, 4, 8), {"log2_steps": 17}, "random_walk: log2_steps must be an integer"),
        ((1, 1, 4, 8), (1, 4, 8), {"beta": 0.0}, r"random_walk: beta must lie in \(0.0, inf\), got 0.0"),
        ((1, 1, 4, 8), (1, 4, 8), {"beta": float("nan")}, "random_walk: beta must lie in"),
        ((1, 1, 4, 8), (1, 4, 8), {"method": "dense"}, "random_walk: method must be one of chebyshev, stepped, got"),
        ((1, 1, 4, 8), (1, 4, 8), {"backend": "triton"}, "random_walk: backend 'triton' cannot run on cpu"),
    ],
)
def test_errors(seeds, edges, options, match):
    with pytest.raises(ValueError, match=match):
        random_walk(torch.zeros(seeds), torch.zeros(edges), **options)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("seeds", float("nan"), "random_walk: seeds must be finite"),
        ("seeds", float("inf"), "random_walk: seeds must be finite"),
        ("edges", float("nan"), r"random_walk: edges must lie in \[0, 1\]"),
        ("edges", 1.001, r"random_walk: edges must lie in \[0, 1\]"),
        ("edges", -0.001, r"random_walk: edges must lie in \[0, 1\]"),
    ],
)
def test_bad_values(backend, name, value, match):
    inputs = {"seeds": torch.zeros(1, 2, 4, 5), "edges": torch.zeros(1, 4, 5)}
    inputs[name].view(-1)[7] = value
    with pytest.raises(ValueError, match=match):
        random_walk(**inputs, backend=backend)


def test_types_and_devices():
    with pytest.raises(TypeError, match="random_walk: seeds must be floating point"):
        random_walk(torch.zeros(1, 1, 4, 4, dtype=torch.int64), torch.zeros(1, 4, 4))
    with pytest.raises(TypeError, match="random_walk: edges must be floating point"):
        random_walk(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8))
    with pytest.raises(TypeError, match="random_walk: seeds must be a tensor, got list"):
        random_walk([[1.0]], torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="random_walk: tensors must be on one device"):
        random_walk(torch.zeros(1, 1, 4, 4, device="meta"), torch.zeros(1, 4, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["stepped", "chebyshev"])
@pytest.mark.parametrize("size", [(32, 40), (33, 65), (1, 9), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_cuda_equals_reference(size, channels, method):
    seeds, edges = seed_maps(2, channels, *size).cuda(), edge_map("noise", *size, 2).cuda()
    leaf, exact = seeds.clone().requires_grad_(), seeds.double().requires_grad_()
    got = random_walk(leaf, edges, method=method, backend="native")
    want = random_walk(exact, edges, method=method, backend="reference")
    assert error(got, want) < 1e-5
    assert torch.equal(got, random_walk(seeds, edges, method=method, backend="native"))
    weight = torch.rand_like(seeds)
    grads = [torch.autograd.grad((out * weight).sum(), x)[0] for out, x in ((got, leaf), (want, exact))]
    assert error(*grads) < 1e-5
