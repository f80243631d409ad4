"""path_affinity_loss and path_affinity_counts: the reference against gathered paths and against plain loops, every
backend against the reference. The CUDA code without a GPU: test_path_affinity_serial.py."""

import math

import pytest
import torch

from kernels import available_backends, path_affinity_counts, path_affinity_loss
from kernels.patch_token_contrast.bench import loss_and_gradient
from kernels.path_affinity_loss import bench, reference
from kernels.random_walk.reference import offsets, path

CPU_BACKENDS = available_backends("path_affinity_loss", "cpu")
native = pytest.mark.skipif("native" not in CPU_BACKENDS, reason="kernels._C is not built")
# h, w, radius: no pair, one source, one tile, several tiles of the native code in each direction, the largest radius
SIZES = [(4, 9, 5), (5, 8, 5), (5, 9, 5), (2, 3, 2), (12, 21, 5), (40, 37, 10), (71, 139, 3), (9, 270, 4), (50, 52, 16)]


def example(b, h, w, classes=3, ignored=0.1, dtype=torch.float32):
    """Logits of both signs and large ones among them; labels 0 .. classes and 255."""
    logits = 2 * torch.randn(b, h, w)
    logits[torch.rand(b, h, w) < 0.01] = 40.0
    labels = torch.randint(0, classes + 1, (b, h, w))
    return logits.to(dtype), torch.where(torch.rand(b, h, w) < ignored, 255, labels)


def run(logits, labels, backend, **options):
    """(loss, gradient)."""
    return loss_and_gradient(lambda x: path_affinity_loss(x, labels, backend=backend, **options), logits)


def assert_near(got, want, tolerance=1e-6):
    torch.testing.assert_close(got[0].double(), want[0].double(), rtol=tolerance, atol=1e-12)
    assert got[1].shape == want[1].shape
    assert (got[1].double() - want[1].double()).norm() <= tolerance * want[1].double().norm()


def equal(got, want):
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def directions(radius):
    """{(dy, dx): cells of the path}, from the distances, as IRN's published code searches them."""
    found = {}
    for dy in range(radius):
        for dx in range(-radius + 1, radius):
            if math.hypot(dy, dx) >= radius or (dy == 0 and dx <= 0):
                continue
            box = [(y, x) for y in range(dy + 1) for x in range(min(dx, 0), max(dx, 0) + 1)]
            found[dy, dx] = [(y, x) for y, x in box if abs(dy * x - dx * y) / math.hypot(dy, dx) < 1 - 1e-12]
    return found


def gathered(logits, labels, radius, counts=None):
    """Loss by index tensors, a path a row, in the dtype of the logits."""
    b, h, w = logits.shape
    pixels = torch.arange(h * w).view(h, w)
    edges, label = logits.sigmoid().flatten(1), labels.flatten(1)
    sums, own = [0.0, 0.0, 0.0], [0, 0, 0]
    for (dy, dx), cells in directions(radius).items():
        if h < radius or w < 2 * radius - 1:
            break

        def at(y, x):
            return pixels[y : y + h - radius + 1, radius - 1 + x : w - radius + 1 + x].flatten()

        affinity = 1 - edges[:, torch.stack([at(*cell) for cell in cells])].max(1).values
        source, target = label[:, at(0, 0)], label[:, at(dy, dx)]
        valid = (source < 255) & (target < 255)
        losses = -(affinity + 1e-5).log(), -(affinity + 1e-5).log(), -(1 + 1e-5 - affinity).log()
        masks = (source == target) & (source == 0), (source == target) & (source > 0), source != target
        for k in range(3):
            sums[k] = sums[k] + losses[k][masks[k] & valid].sum()
            own[k] += int((masks[k] & valid).sum())
    divisors = own if counts is None else counts.tolist()
    return sum(c * s / (n + 1e-5) for c, s, n in zip((0.25, 0.25, 0.5), sums, divisors, strict=True)) + 0 * logits.sum()


class TestGeometry:
    def test_directions_and_paths(self):
        for radius in (2, 5, 10):
            assert {d: path(*d) for d in offsets(radius)} == directions(radius)  # in the same order too

    def test_sources_of_a_crop(self):
        rows, columns = reference.sources(128, 128, 10)
        assert (rows.start, rows.stop, columns.start, columns.stop) == (0, 119, 9, 119)  # 119 x 110 of them
        labels = torch.zeros(1, 128, 128, dtype=torch.uint8)
        assert path_affinity_counts(labels).tolist() == [13090 * 152, 0, 0]

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_one_source_by_hand(self, backend):
        """Radius 2 in a map of 2 x 3: the source (0, 1) and its partners right, and below left, straight and right."""
        logits = torch.tensor([[[0.0, 1.0, 2.0], [-1.0, 3.0, 4.0]]])
        labels = torch.tensor([[[9, 0, 0], [1, 255, 0]]])
        assert path_affinity_counts(labels, radius=2, backend=backend).tolist() == [2, 0, 1]

        def log_affinity(z):
            return math.log(1 / (1 + math.exp(z)) + 1e-5)

        negative = math.log(1 / (1 + math.exp(-3.0)) + 1e-5)  # (0, 0) (0, 1) (1, 0) (1, 1)
        want = -0.25 * (log_affinity(2) + log_affinity(4)) / (2 + 1e-5) - 0.5 * negative / (1 + 1e-5)
        loss, gradient = run(logits, labels, backend, radius=2)
        assert abs(loss.item() - want) < 1e-6
        assert (gradient != 0).tolist() == [[[False, False, True], [False, True, True]]]
        assert gradient[0, 1, 1] < 0 < gradient[0, 0, 2]  # more edge between classes, less within one


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("h", "w", "radius"), SIZES)
def test_against_gathered_paths(h, w, radius, backend):
    logits, labels = example(2, h, w, ignored=0.2)
    want = loss_and_gradient(lambda x: gathered(x, labels, radius), logits.double())
    exact = loss_and_gradient(
        lambda x: path_affinity_loss(x, labels, radius=radius, backend="reference"), logits.double()
    )
    # 1 - edge at 40 is rounded to 4e-18 of 1e-5 there
    assert_near(exact, want, 1e-11)
    assert_near(run(logits, labels, backend, radius=radius), exact, 3e-7)  # computed in fp64, given in fp32
    counts = path_affinity_counts(labels, radius=radius, backend=backend)
    assert counts.dtype == torch.int64 and counts.shape == (3,)
    assert torch.equal(counts, path_affinity_counts(labels, radius=radius, backend="reference"))
    pairs = 2 * max(h - radius + 1, 0) * max(w - 2 * radius + 2, 0) * len(offsets(radius))
    everything = path_affinity_counts(labels, radius=radius, ignore_index=-1, backend=backend)
    assert everything.sum() == pairs and (counts.sum() < pairs or pairs < 100)


def first_highest(logits, labels, radius):
    """Loss and gradient, fp64, pair by pair: the gradient goes to the first of the highest logits of the path."""
    b, h, w = logits.shape
    wins = torch.zeros(3, b, h, w, dtype=torch.float64)
    for image in range(b):
        for row in range(h - radius + 1):
            for column in range(radius - 1, w - radius + 1):
                for (dy, dx), cells in directions(radius).items():
                    ours, theirs = labels[image, row, column].item(), labels[image, row + dy, column + dx].item()
                    if 255 in (ours, theirs):
                        continue
                    places = [(row + y, column + x) for y, x in cells]
                    values = [logits[image, y, x].item() for y, x in places]
                    winner = places[values.index(max(values))]
                    wins[2 if ours != theirs else int(ours > 0), image, winner[0], winner[1]] += 1
    e = logits.double().sigmoid()
    scale = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64) / (wins.sum((1, 2, 3)) + 1e-5)
    background, foreground, negative = scale[:, None, None, None] * wins
    same = background + foreground
    loss = (-same * (1 - e + 1e-5).log() - negative * (e + 1e-5).log()).sum()
    return loss, e * (1 - e) * (same / (1 - e + 1e-5) - negative / (e + 1e-5))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_ties_go_to_the_first_of_the_path(levels, backend):
    for radius, h, w in ((2, 4, 6), (3, 7, 9), (5, 8, 12)):
        _, labels = example(1, h, w)
        logits = torch.randint(0, levels, (1, h, w)).float() - levels // 2
        assert_near(run(logits, labels, backend, radius=radius), first_highest(logits, labels, radius))
        signed = torch.where(torch.rand(1, h, w) < 0.5, -0.0, 0.0) + torch.zeros(1, h, w).copysign(logits)
        flat = torch.where(signed == 0, torch.where(torch.rand(1, h, w) < 0.5, -0.0, 0.0), signed)
        assert torch.signbit(flat).any() and not torch.signbit(flat).all()
        got = run(flat, labels, backend, radius=radius)
        assert_near(got, first_highest(torch.zeros(1, h, w), labels, radius))  # -0 is 0


@native
@pytest.mark.parametrize("radius", [10, 16])
def test_a_pixel_that_wins_everything(radius):
    """Its thousands of pairs fit the counters."""
    h = w = 4 * radius
    logits, labels = torch.full((1, h, w), -3.0), torch.zeros(1, h, w, dtype=torch.int64)
    logits[0, h // 2, w // 2] = 1.0
    got, want = run(logits, labels, "native", radius=radius), run(logits.double(), labels, "reference", radius=radius)
    assert_near(got, want)
    cells = sum(len(path(*d)) for d in offsets(radius))
    slope = torch.tensor(1.0).sigmoid() * 0.25 / path_affinity_counts(labels, radius=radius)[0]
    assert abs(got[1][0, h // 2, w // 2] / (cells * slope) - 1) < 1e-4  # eps


@pytest.mark.parametrize("backend", CPU_BACKENDS)
class TestEachBackend:
    def test_nothing_to_compare(self, backend):
        """No pair at all: loss 0, gradient 0."""
        logits, labels = example(2, 14, 22)
        nothing = torch.full_like(labels, 255)
        for z, y, radius in (
            (logits, nothing, 5),
            (logits[:, :9], labels[:, :9], 10),
            (logits[:, :, :18], labels[:, :, :18], 10),
            (logits, labels, 1),
            (logits[:0], labels[:0], 5),
            (logits[:, :0], labels[:, :0], 5),
            (logits[:, :, :0], labels[:, :, :0], 5),
        ):
            loss, gradient = run(z, y, backend, radius=radius)
            assert loss.shape == () and loss.item() == 0 and torch.equal(gradient, torch.zeros_like(z))
            assert path_affinity_counts(y, radius=radius, backend=backend).tolist() == [0, 0, 0]

    def test_single_class(self, backend):
        logits, labels = example(1, 14, 22)
        for value, place in ((0, 0), (7, 1)):
            same = torch.where(labels == 255, 255, value)
            assert path_affinity_counts(same, radius=4, backend=backend).nonzero().tolist() == [[place]]
            loss, gradient = run(logits, same, backend, radius=4)
            assert_near((loss, gradient), run(logits.double(), same, "reference", radius=4))
            assert loss > 0 and (gradient >= 0).all()

    def test_extreme_logits(self, backend):
        """Finite, with the affinity at 0 or 1; -ln(eps) is the highest loss of a pair."""
        logits = 1e30 * torch.randn(1, 12, 16)
        labels = example(1, 12, 16)[1]
        loss, gradient = run(logits, labels, backend, radius=3)
        assert 0 < loss <= -math.log(1e-5) and not gradient.any()

    def test_counts_of_other_ranks(self, backend):
        """The losses of two ranks, with the counts of both, add up to the loss of the whole batch."""
        logits, labels = example(4, 14, 22)
        total = sum(path_affinity_counts(labels[part], radius=5) for part in (slice(0, 1), slice(1, 4)))
        assert torch.equal(total, path_affinity_counts(labels, radius=5))
        whole = run(logits, labels, backend, radius=5)
        parts = [run(logits[p], labels[p], backend, radius=5, counts=total) for p in (slice(0, 1), slice(1, 4))]
        torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0], rtol=1e-6, atol=0)
        assert_near((whole[0], torch.cat([g for _, g in parts])), whole)
        assert (parts[0][1] - run(logits[:1], labels[:1], backend, radius=5)[1]).abs().max() > 0
        want = loss_and_gradient(lambda x: gathered(x, labels[:1], 5, total), logits[:1].double())
        assert_near(parts[0], want)
        none = torch.zeros(3, dtype=torch.int64)
        assert run(logits, torch.full_like(labels, 255), backend, radius=5, counts=none)[0].item() == 0

    def test_labels_of_every_dtype(self, backend):
        logits, labels = example(2, 9, 14, classes=100)
        want = run(logits, labels, backend, radius=3)
        for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
            assert equal(run(logits, labels.to(dtype), backend, radius=3), want)
            counts = path_affinity_counts(labels.to(dtype), radius=3, backend=backend)
            assert torch.equal(counts, path_affinity_counts(labels, radius=3, backend="reference"))
        for ignore in (-1, 101, 2**40):
            other = torch.where(labels == 255, ignore, labels)
            assert equal(run(logits, other, backend, radius=3, ignore_index=ignore), want)
        # 255 of uint8 is not -1: a class as any other
        as_class = run(logits, torch.where(labels == 255, 32766, labels), backend, radius=3)
        assert equal(run(logits, labels.to(torch.uint8), backend, radius=3, ignore_index=-1), as_class)

    def test_layouts(self, backend):
        logits, labels = example(3, 14, 22)
        want = run(logits, labels, backend, radius=5)
        four = run(logits.unsqueeze(1), labels, backend, radius=5)
        assert four[1].shape == (3, 1, 14, 22) and equal((four[0], four[1].squeeze(1)), want)
        turned = logits.mT.contiguous().mT, torch.stack([labels, labels], -1)[..., 0]
        wide = torch.stack([logits, -logits], 1)[:, :1], labels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        same = equal if backend == "native" else lambda got, ours: assert_near(got, ours) is None
        assert same(run(*turned, backend, radius=5), want)
        got = run(*wide, backend, radius=5)
        assert same((got[0], got[1].squeeze(1)), want)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half(self, backend, dtype):
        logits, labels = example(2, 9, 14, dtype=dtype)
        full = run(logits.float(), labels, backend, radius=3)
        loss, gradient = run(logits, labels, backend, radius=3)
        assert loss.dtype == torch.float32 and gradient.dtype == dtype
        assert torch.equal(loss, full[0]) and torch.equal(gradient, full[1].to(dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert equal(run(logits.float(), labels, backend, radius=3), full)
        scaled = loss_and_gradient(
            lambda x: 2.0**14 * path_affinity_loss(x, labels, radius=3, backend=backend), logits.clone()
        )
        assert torch.equal(scaled[1], (2.0**14 * full[1]).to(dtype))  # before it is rounded to half

    def test_inputs_are_untouched_and_runs_repeat(self, backend):
        logits, labels = example(2, 9, 14)
        counts = path_affinity_counts(labels, radius=3)
        before = logits.clone(), labels.clone(), counts.clone()
        first = run(logits, labels, backend, radius=3, counts=counts)
        assert equal(run(logits, labels, backend, radius=3, counts=counts), first)
        assert equal((logits, labels, counts), before)
        with torch.no_grad():
            loss = path_affinity_loss(logits.requires_grad_(), labels, radius=3, counts=counts, backend=backend)
        assert torch.equal(loss, first[0]) and not loss.requires_grad

    def test_compile_fullgraph(self, backend):
        logits, labels = example(2, 9, 14)
        counts = path_affinity_counts(labels, radius=3)
        options = {"radius": 3, "backend": backend}
        compiled = torch.compile(path_affinity_loss, fullgraph=True, backend="aot_eager")
        for extra in ({}, {"counts": counts}):
            got = loss_and_gradient(lambda x, e=extra: 2 * compiled(x, labels, **options, **e), logits)
            want = loss_and_gradient(lambda x, e=extra: 2 * path_affinity_loss(x, labels, **options, **e), logits)
            assert_near(got, want)
        count = torch.compile(path_affinity_counts, fullgraph=True, backend="aot_eager")
        assert torch.equal(count(labels, **options), counts)


def test_gradcheck():
    labels = example(1, 6, 9)[1]
    no_ties = torch.linspace(-2, 2, 54, dtype=torch.float64)[torch.randperm(54)]
    logits = no_ties.view(1, 6, 9).requires_grad_()
    counts = torch.tensor([11, 40, 7])
    assert torch.autograd.gradcheck(lambda x: path_affinity_loss(x, labels, radius=4), logits)
    assert torch.autograd.gradcheck(lambda x: path_affinity_loss(x, labels, radius=4, counts=counts), logits)


@native
def test_float64_goes_to_the_reference():
    logits, labels = example(1, 9, 14, dtype=torch.float64)
    assert path_affinity_loss(logits, labels, radius=3).dtype == torch.float64
    with pytest.raises(TypeError, match="path_affinity_loss: the native backend takes fp32, bf16 and fp16; use"):
        path_affinity_loss(logits, labels, radius=3, backend="native")


@native
def test_bits_depend_on_neither_threads_nor_run_nor_memory_nor_batch():
    logits, labels = example(3, 71, 139)
    want = run(logits, labels, "native", radius=6)
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert all(equal(run(logits, labels, "native", radius=6), want) for _ in range(10))
        torch.use_deterministic_algorithms(True)  # fills every fresh tensor with NaN
        assert torch.empty(3).isnan().all()
        assert equal(run(logits, labels, "native", radius=6), want)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)
    # The loss sums over the batch, so its last bit may depend on the order of the images; the gradient's may not.
    got = run(logits.flip(0), labels.flip(0), "native", radius=6)
    torch.testing.assert_close(got[0], want[0], rtol=2e-7, atol=0)
    assert torch.equal(got[1].flip(0), want[1])
    counts = path_affinity_counts(labels, radius=6)
    pairs = zip(logits.split(1), labels.split(1), strict=True)
    alone = [run(z, y, "native", radius=6, counts=counts)[1] for z, y in pairs]
    assert torch.equal(torch.cat(alone), want[1])


@native
def test_opcheck_and_second_derivative():
    logits, labels = example(2, 9, 14)
    counts = path_affinity_counts(labels, radius=3)
    loss = torch.ops.wsss.path_affinity_loss
    for given in (None, counts):
        torch.library.opcheck(loss.default, (logits.clone().requires_grad_(), labels, 3, 255, given, True))
        torch.library.opcheck(loss.default, (logits, labels, 3, 255, given, False))
    torch.library.opcheck(torch.ops.wsss.path_affinity_counts.default, (labels, 3, 255))
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(-3 * path_affinity_loss(logits, labels, radius=3), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="path_affinity_loss, .* the gradient itself is not differentiable"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="with_gradient=False, so it has no gradient"):
        loss(logits, labels, 3, 255, None, False)[0].backward()


@native
def test_direct_call_is_checked():
    logits, labels = example(2, 9, 14)
    loss, count = torch.ops.wsss.path_affinity_loss, torch.ops.wsss.path_affinity_counts
    with pytest.raises(TypeError, match="path_affinity_loss: edge_logits must be float32, got Double"):
        loss(logits.double(), labels, 3, 255, None, False)
    with pytest.raises(ValueError, match="path_affinity_loss: edge_logits must have 3 dimensions"):
        loss(logits[0], labels, 3, 255, None, False)
    with pytest.raises(ValueError, match=r"path_affinity_loss: labels must be \[2, 9, 14\], got \[2, 9, 13\]"):
        loss(logits, labels[..., 1:], 3, 255, None, False)
    with pytest.raises(TypeError, match="path_affinity_loss: counts must be int64, got Int"):
        loss(logits, labels, 3, 255, torch.zeros(3).int(), False)
    with pytest.raises(ValueError, match=r"path_affinity_loss: counts must be \[3\], got \[4\]"):
        loss(logits, labels, 3, 255, torch.zeros(4).long(), False)
    with pytest.raises(ValueError, match="path_affinity_loss: counts must be >= 0, got -1"):
        loss(logits, labels, 3, 255, torch.tensor([1, -1, 1]), False)
    for radius in (0, 17, -(2**63)):
        with pytest.raises(ValueError, match=r"path_affinity_counts: radius must lie in \[1, 16\], got"):
            count(labels, radius, 255)
    with pytest.raises(ValueError, match="path_affinity_counts: labels must have 3 dimensions"):
        count(labels[0], 3, 255)
    with pytest.raises(TypeError, match="path_affinity_counts: labels must hold integers, got Bool"):
        count(labels > 0, 3, 255)
    for wrong in (-1, 32767, 2**40):
        match = rf"labels must lie in \[0, 32766\] or be 255 \(ignored\), got {wrong}"
        for call in (lambda y: count(y, 3, 255), lambda y: loss(logits, y, 3, 255, None, False)):
            with pytest.raises(ValueError, match=match):
                call(torch.where(labels == 1, wrong, labels))


@pytest.mark.parametrize(
    ("logits", "labels", "options", "match"),
    [
        ((2, 3, 8, 9), (2, 8, 9), {}, r"path_affinity_loss: edge_logits must be \[B, 1, h, w\], got \(2, 3, 8, 9\)"),
        ((8, 9), (8, 9), {}, r"path_affinity_loss: edge_logits must be \[B, 1, h, w\], got \(8, 9\)"),
        ((2, 8, 9), (2, 9, 8), {}, r"path_affinity_loss: labels must be \[2, 8, 9\], got \(2, 9, 8\)"),
        ((2, 8, 9), (2, 1, 8, 9), {}, r"path_affinity_loss: labels must be \[2, 8, 9\], got \(2, 1, 8, 9\)"),
        ((2, 8, 9), (2, 8, 9), {"radius": 0}, r"path_affinity_loss: radius must be an integer in \[1, 16\], got 0"),
        ((2, 8, 9), (2, 8, 9), {"radius": 17}, "path_affinity_loss: radius must be an integer"),
        ((2, 8, 9), (2, 8, 9), {"radius": 2.5}, "path_affinity_loss: radius must be an integer"),
        ((2, 8, 9), (2, 8, 9), {"ignore_index": 0.5}, "path_affinity_loss: ignore_index must be an integer, got 0.5"),
        ((2, 8, 9), (2, 8, 9), {"counts": torch.zeros(4).long()}, r"loss: counts must be \[3\], got \(4,\)"),
        ((2, 8, 9), (2, 8, 9), {"counts": torch.tensor([0, -2, 0])}, r"counts must be >= 0, got \[0, -2, 0\]"),
        ((2, 8, 9), (2, 8, 9), {"backend": "triton"}, "path_affinity_loss: backend 'triton' cannot run on cpu"),
    ],
)
def test_errors(logits, labels, options, match):
    with pytest.raises(ValueError, match=match):
        path_affinity_loss(torch.zeros(logits), torch.zeros(labels).long(), **options)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_bad_values(backend):
    for value in (math.nan, math.inf, -math.inf):
        logits, labels = example(2, 9, 14)
        logits[1, 8, 13] = value
        with pytest.raises(ValueError, match="path_affinity_loss: edge_logits must be finite, got NaN or infinity"):
            path_affinity_loss(logits, labels, radius=3, backend=backend)
    logits, labels = example(2, 9, 14)
    for value in (-1, 32767):
        labels[1, 8, 13] = value
        match = rf"labels must lie in \[0, 32766\] or be 255 \(ignored\), got {value}"
        with pytest.raises(ValueError, match=f"path_affinity_loss: {match}"):
            path_affinity_loss(logits, labels, radius=3, backend=backend)
        with pytest.raises(ValueError, match=f"path_affinity_counts: {match}"):
            path_affinity_counts(labels, radius=3, backend=backend)


def test_types_and_devices():
    logits, labels = example(2, 9, 14)
    with pytest.raises(TypeError, match="path_affinity_loss: edge_logits must be floating point"):
        path_affinity_loss(labels, labels)
    with pytest.raises(TypeError, match="path_affinity_loss: edge_logits must be a tensor, got list"):
        path_affinity_loss([1.0], labels)
    with pytest.raises(TypeError, match="path_affinity_loss: labels must hold integers, got torch.float32"):
        path_affinity_loss(logits, logits)
    with pytest.raises(TypeError, match="path_affinity_loss: counts must be int64, got torch.float32"):
        path_affinity_loss(logits, labels, counts=torch.ones(3))
    with pytest.raises(ValueError, match="path_affinity_loss: tensors must be on one device"):
        path_affinity_loss(logits.to("meta"), labels)
    with pytest.raises(ValueError, match="path_affinity_loss: tensors must be on one device"):
        path_affinity_loss(logits, labels, counts=torch.ones(3, device="meta").long())
    with pytest.raises(TypeError, match="path_affinity_counts: labels must hold integers, got torch.bool"):
        path_affinity_counts(labels > 0)
    with pytest.raises(ValueError, match=r"path_affinity_counts: labels must be \[B, h, w\], got \(9, 14\)"):
        path_affinity_counts(labels[0])
    with pytest.raises(ValueError, match=r"path_affinity_counts: radius must be an integer in \[1, 16\], got 20"):
        path_affinity_counts(labels, radius=20)


def test_bench_peers_compute_the_same(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "of the op test", (2, 14, 20, 4))
    want = bench.expected("of the op test", torch.device("cpu"))
    assert_near(bench.peers("of the op test", torch.device("cpu"))["eager"](), want, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("h", "w", "radius"), SIZES)
def test_cuda_equals_reference(h, w, radius):
    logits, labels = (x.cuda() for x in example(3, h, w))
    counts = path_affinity_counts(labels, radius=radius, backend="native")
    assert torch.equal(counts, path_affinity_counts(labels, radius=radius, backend="reference"))
    for given in (None, counts + 3):
        want = run(logits.double(), labels, "reference", radius=radius, counts=given)
        got = run(logits, labels, "native", radius=radius, counts=given)
        assert_near(got, want, 3e-7)
        assert equal(run(logits, labels, "native", radius=radius, counts=given), got)
