"""psl_loss: the worked example of the definition, the reference against plain loops, every backend against the
reference."""

import math

import pytest
import torch

from kernels import PSLLoss, available_backends, psl_loss
from kernels.psl_loss import bench, reference

CPU_BACKENDS = available_backends("psl_loss", "cpu")
native = pytest.mark.skipif("native" not in CPU_BACKENDS, reason="kernels._C is not built")
# B, K, H, W: one pixel, one class, less than a block of the native code, a tile, one pixel more, chunks, many classes
SIZES = [(1, 3, 1, 1), (2, 1, 3, 5), (3, 2, 4, 7), (2, 21, 16, 16), (2, 4, 1, 257), (2, 5, 91, 93), (1, 255, 9, 8)]


def example(b, k, h, w, ignored=0.2, dtype=torch.float32):
    """Logits, confidences with a zero and a one among them, labels of every class and 255, some classes present."""
    logits = 3 * torch.randn(b, k, h, w)
    confidences = torch.rand(b, k - 1)
    confidences[torch.rand(b, k - 1) < 0.1], confidences[torch.rand(b, k - 1) < 0.1] = 0, 1
    labels = torch.where(torch.rand(b, h, w) < ignored, 255, torch.randint(0, k, (b, h, w)))
    return logits.to(dtype), confidences, labels, torch.rand(b, k - 1) < 0.5


def run(logits, *rest, backend, flows=(1.0, 1.0), **options):
    """The result and the gradient of both losses, weighted by `flows` and by image."""
    leaf = logits.detach().requires_grad_()
    out = psl_loss(leaf, *rest, backend=backend, **options)
    by_image = torch.arange(1.0, len(logits) + 1).to(out.labelled)
    loss = (by_image * (flows[0] * out.labelled + flows[1] * out.online)).sum()
    return PSLLoss(*(x.detach() for x in out)), *torch.autograd.grad(loss, leaf)


def equal(got, want):
    return all(torch.equal(a, b) for a, b in zip((*got[0], got[1]), (*want[0], want[1]), strict=True))


def exact(logits, confidences, labels, present, flows=(1.0, 1.0), ignore_index=255):
    """In fp64 with the mask of the reference in fp32, whose decisions are those of every backend."""
    mask = psl_loss(logits, confidences, labels, present, ignore_index=ignore_index, backend="reference").mask
    leaf = logits.detach().double().requires_grad_()
    losses, counts = reference.terms(leaf, labels, mask, present > 0, ignore_index)
    by_image = torch.arange(1.0, len(logits) + 1).double()
    (gradient,) = torch.autograd.grad((by_image * (flows[0] * losses[0] + flows[1] * losses[1])).sum(), leaf)
    return PSLLoss(*(x.detach() for x in losses), mask, *counts.unbind(1)), gradient


def assert_near(got, want, tolerance=1e-6, flows=(1.0, 1.0)):
    """Decisions and counts are equal. A gradient is (f - 1) / N at the target, so its error is one of 1 / N."""
    for ours, theirs in zip(got[0][:2], want[0][:2], strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got[0][2:], want[0][2:], strict=True))
    assert got[1].shape == want[1].shape
    shares = (abs(flow) / n.clamp(min=1) for flow, n in zip(flows, want[0][3:], strict=True))
    share = (sum(shares) * torch.arange(1, len(got[1]) + 1)).double()[:, None, None, None]
    assert ((got[1].double() - want[1].double()).abs() <= tolerance * (share + want[1].double().abs())).all()


class TestWorkedExample:
    """The grid of the method's definition: 2 x 4 pixels, 4 classes, of which the last is absent."""

    LOGITS = torch.tensor(
        [
            [[2, 0.5, -1, 0], [0, 1, 0.2, 0]],
            [[0.5, 2, 1, 0.3], [1, -0.9, 0.1, 2]],
            [[0, 1.8, 2, 0.5], [0.2, 0.3, 1.5, 0]],
            [[-1, 0, 0.1, 3.2], [0.4, 2.9, 0, 1.9]],
        ],
    ).unsqueeze(0)
    REST = (
        torch.tensor([[0.45, 0.25, 0.30]]),
        torch.tensor([[[0, 1, 255, 255], [0, 255, 2, 1]]]),
        torch.tensor([[1, 1, 0]]),
    )

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_losses_and_gradient(self, backend):
        out, gradient = run(self.LOGITS, *self.REST, backend=backend)
        assert out.mask.tolist() == [[[0, 1, 2, 3], [1, 3, 0, 1]]]
        assert (out.labelled_pixels.item(), out.online_pixels.item()) == (5, 6)
        assert abs(out.labelled.item() - 0.8628083) < 1e-7 and abs(out.online.item() - 0.8438924) < 1e-7
        for place, want in (
            ((0, 0), (-0.106297, 0.058096, 0.035237, 0.012963)),
            ((0, 3), (0, 0, 0, 0)),
            ((1, 2), (-0.109311, 0.051898, 0.010455, 0.046959)),
        ):
            want = torch.tensor(want, dtype=torch.float32)
            torch.testing.assert_close(gradient[0, :, *place], want, rtol=0, atol=6e-7)  # six digits are given
        assert not gradient[0, :, 0, 3].any()  # exactly

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    @pytest.mark.parametrize(
        ("confidences", "mask"),
        [((0.45, 0.47, 0.08), [[0, 1, 2, 0], [1, 0, 2, 1]]), ((0.45, 0.45, 0.10), [[0, 1, 2, 3], [1, 0, 2, 1]])],
    )
    def test_rule_of_the_test_time(self, confidences, mask, backend):
        """Confidences below 0.1 become 0: such a class is impossible."""
        v = torch.tensor([confidences])
        out = psl_loss(self.LOGITS, torch.where(v < 0.1, 0, v), *self.REST[1:], backend=backend)
        assert out.mask.tolist() == [mask]

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_no_gradient_into_the_confidences(self, backend):
        scores, logits = torch.randn(1, 3, requires_grad=True), self.LOGITS.clone().requires_grad_()
        out = psl_loss(logits, scores.softmax(1), *self.REST[1:], backend=backend)
        loss = (out.labelled + out.online).mean() + 0 * scores.sum()
        loss.backward()
        assert not scores.grad.any() and logits.grad.any()
        alone = psl_loss(logits.detach(), scores.softmax(1), *self.REST[1:], backend=backend)
        assert not alone.labelled.requires_grad and not alone.online.requires_grad

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_no_labelled_pixel(self, backend):
        labels = torch.full_like(self.REST[1], 255)
        out, gradient = run(self.LOGITS, self.REST[0], labels, self.REST[2], backend=backend)
        assert out.labelled.item() == 0 and out.labelled_pixels.item() == 0
        assert abs(out.online.item() - 0.8438924) < 1e-7 and gradient.isfinite().all() and gradient.any()


def by_loops(logits, confidences, labels, present, ignore_index=255):
    """Everything pixel by pixel in Python's floats: the products w f themselves, no logarithm of w."""
    b, k, h, w = logits.shape
    losses, counts = torch.zeros(2, b, dtype=torch.float64), torch.zeros(b, 2, dtype=torch.int64)
    mask, gradient = torch.zeros(b, h, w, dtype=torch.uint8), torch.zeros(logits.shape, dtype=torch.float64)
    for image in range(b):
        weights = [1.0, *confidences[image].double().tolist()]
        allowed = {0, *(c + 1 for c in range(k - 1) if present[image, c])}
        counted = [], []
        for y in range(h):
            for x in range(w):
                z = logits[image, :, y, x].double().tolist()
                e = [math.exp(v - max(z)) for v in z]
                f = [v / sum(e) for v in e]
                scores = [a * v for a, v in zip(weights, f, strict=True)]
                mask[image, y, x] = scores.index(max(scores))
                for term, q in enumerate((labels[image, y, x].item(), mask[image, y, x].item())):
                    if q in allowed and (q != ignore_index or term == 1):
                        counted[term].append((y, x, q, f))
        for term in range(2):
            n = counts[image, term] = len(counted[term])
            for y, x, q, f in counted[term]:
                losses[term, image] -= math.log(f[q]) / n
                slope = [(f[c] - (c == q)) / n for c in range(k)]
                gradient[image, :, y, x] += torch.tensor(slope, dtype=torch.float64)
    by_image = torch.arange(1.0, b + 1).double()[:, None, None, None]
    return PSLLoss(*losses, mask, *counts.unbind(1)), by_image * gradient


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("size", [(1, 3, 1, 1), (2, 1, 3, 5), (3, 4, 6, 7), (2, 21, 5, 8)])
def test_against_loops(size, backend):
    args = example(*size)
    want = by_loops(*args)
    assert_near(run(*args, backend=backend), want, 3e-7)
    double = (args[0].double(), args[1].double(), *args[2:])
    assert_near(run(*double, backend="reference"), want, 1e-13)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_against_the_reference(size, backend):
    args = example(*size)
    assert_near(run(*args, backend=backend), exact(*args))
    for flows in ((1.0, 0.0), (0.0, 3.0), (-2.0, 0.5)):
        assert_near(run(*args, backend=backend, flows=flows), exact(*args, flows=flows), flows=flows)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
class TestEachBackend:
    def test_ties_go_to_the_lowest_class(self, backend):
        logits = torch.randint(0, 2, (2, 5, 9, 11)).float()
        rest = torch.ones(2, 4), torch.zeros(2, 9, 11).long(), torch.ones(2, 4)
        out = psl_loss(logits, *rest, backend=backend)
        assert torch.equal(out.mask.long(), logits.argmax(1)) and 0 < out.mask.float().mean() < 1
        assert not psl_loss(0 * logits, *rest, backend=backend).mask.any()

    def test_one_loss_alone(self, backend):
        logits, *rest = example(2, 4, 6, 7)
        for name, flows in (("labelled", (1.0, 0.0)), ("online", (0.0, 1.0))):
            leaf = logits.clone().requires_grad_()
            loss = getattr(psl_loss(leaf, *rest, backend=backend), name)
            (gradient,) = torch.autograd.grad((loss * torch.tensor([1.0, 2.0])).sum(), leaf)
            assert torch.equal(gradient, run(logits, *rest, backend=backend, flows=flows)[1])

    def test_a_label_that_is_absent_is_not_counted(self, backend):
        logits, confidences, labels, present = example(2, 5, 8, 9, ignored=0)
        allowed = torch.cat([torch.ones(2, 1).bool(), present], 1)
        hidden = torch.where(allowed.gather(1, labels.flatten(1)).view_as(labels), labels, 255)
        assert (hidden == 255).any() and (hidden != 255).any()
        want = run(logits, confidences, hidden, present, backend=backend)
        assert equal(run(logits, confidences, labels, present, backend=backend), want)

    def test_nothing_counted(self, backend):
        """A sure absent class everywhere, no label: both losses and all gradients are 0."""
        logits = torch.zeros(2, 3, 5, 6)
        logits[:, 2] = 9.0
        labels = torch.full((2, 5, 6), 255)
        out, gradient = run(logits, torch.ones(2, 2), labels, torch.tensor([[1, 0], [0, 0]]), backend=backend)
        assert out.mask.eq(2).all() and not out.labelled.any() and not out.online.any() and not gradient.any()
        assert not out.labelled_pixels.any() and not out.online_pixels.any()

    def test_empty(self, backend):
        for size in ((0, 4, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0)):
            args = example(*size)
            out, gradient = run(*args, backend=backend)
            assert out.mask.shape == (size[0], *size[2:]) and torch.equal(gradient, torch.zeros(size))
            for x in (out.labelled, out.online, out.labelled_pixels, out.online_pixels):
                assert torch.equal(x, torch.zeros_like(x)) and x.shape == (size[0],)

    def test_extreme_logits(self, backend):
        """f is 0 and 1: the loss of a wrong class is the distance of its logit."""
        logits, confidences, labels, present = example(2, 4, 9, 8)
        for scale in (1e4, 1e30):
            args = scale * logits, confidences, labels, torch.ones_like(present)
            got, want = run(*args, backend=backend), exact(*args)
            assert got[0].labelled.isfinite().all() and got[1].isfinite().all()
            assert_near(got, want)

    def test_sure_pixels(self, backend):
        """Small losses keep their digits as far as float32 has them next to 1."""
        logits = torch.tensor([12.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 20, 20)
        zeros = torch.zeros(1, 20, 20).long()
        out = psl_loss(logits, torch.ones(1, 2), zeros, torch.ones(1, 2), backend=backend)
        assert abs(out.labelled.item() - math.log1p(2 * math.exp(-12))) < 1.2e-7

    def test_layouts_and_dtypes_of_the_rest(self, backend):
        logits, confidences, labels, present = example(3, 6, 14, 22)
        want = run(logits, confidences, labels, present, backend=backend)
        same = equal if backend == "native" else lambda got, ours: assert_near(got, ours) is None
        turned = logits.to(memory_format=torch.channels_last), labels.mT.contiguous().mT, present.T.contiguous().T
        assert same(run(turned[0], confidences, *turned[1:], backend=backend), want)
        wide = torch.stack([logits, -logits], 1)[:, 0], torch.stack([confidences] * 2, -1)[..., 0]
        assert same(run(*wide, labels, present, backend=backend), want)
        for dtype in (torch.uint8, torch.int16, torch.int32):
            assert equal(run(logits, confidences, labels.to(dtype), present, backend=backend), want)
        for dtype in (torch.uint8, torch.float32, torch.int64):
            assert equal(run(logits, confidences, labels, present.to(dtype), backend=backend), want)
        tags = 3 * present.float() - 2  # -2 is as absent as 0
        assert equal(run(logits, confidences, labels, tags, backend=backend), want)

    def test_ignore_index(self, backend):
        args = example(2, 5, 8, 9)
        want = run(*args, backend=backend)
        for ignore in (-1, 5, 2**40):
            labels = torch.where(args[2] == 255, ignore, args[2])
            assert equal(run(*args[:2], labels, args[3], backend=backend, ignore_index=ignore), want)
        labels = args[2] % 5
        got = run(*args[:2], labels, args[3], backend=backend, ignore_index=2)  # a class, ignored in the labels alone
        assert_near(got, exact(*args[:2], labels, args[3], ignore_index=2))
        assert (got[0].mask == 2).any()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half(self, backend, dtype):
        logits, *rest = example(2, 7, 13, 21, dtype=dtype)
        full, got = run(logits.float(), *rest, backend=backend), run(logits, *rest, backend=backend)
        assert got[0].labelled.dtype == torch.float32 and got[1].dtype == dtype
        assert equal(got, (full[0], full[1].to(dtype)))
        scaled = run(logits, *rest, backend=backend, flows=(2.0**14, 2.0**14))
        assert torch.equal(scaled[1], (2.0**14 * full[1]).to(dtype))  # before it is rounded to half

    def test_half_confidences(self, backend):
        logits, confidences, *rest = example(2, 7, 13, 21)
        half = confidences.half()
        assert equal(run(logits, half, *rest, backend=backend), run(logits, half.float(), *rest, backend=backend))

    def test_autocast(self, backend):
        args = example(2, 4, 6, 7)
        want = run(*args, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert equal(run(*args, backend=backend), want)

    def test_inputs_are_untouched_and_runs_repeat(self, backend):
        args = example(2, 4, 6, 7)
        before = [x.clone() for x in args]
        want = run(*args, backend=backend)
        assert equal(run(*args, backend=backend), want)
        assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
        with torch.no_grad():
            out = psl_loss(args[0].clone().requires_grad_(), *args[1:], backend=backend)
        assert equal((out, want[1]), want) and not out.online.requires_grad

    def test_compile_fullgraph(self, backend):
        compiled = torch.compile(psl_loss, fullgraph=True, backend="aot_eager")
        for size in ((2, 4, 6, 7), (3, 4, 9, 7)):
            logits, *rest = example(*size)
            leaf = logits.clone().requires_grad_()
            out = compiled(leaf, *rest, backend=backend)
            by_image = torch.arange(1.0, size[0] + 1)
            (gradient,) = torch.autograd.grad((by_image * (out.labelled + out.online)).sum(), leaf)
            assert isinstance(out, PSLLoss)
            assert_near((PSLLoss(*(x.detach() for x in out)), gradient), run(logits, *rest, backend=backend))

    @pytest.mark.parametrize(
        ("place", "value", "match"),
        [
            (0, math.nan, "logits must be finite, got NaN or infinity"),
            (0, math.inf, "logits must be finite, got NaN or infinity"),
            (0, -math.inf, "logits must be finite, got NaN or infinity"),
            (1, math.nan, r"confidences must lie in \[0, 1\], got nan"),
            (1, -0.1, r"confidences must lie in \[0, 1\], got -0.1"),
            (1, 1.01, r"confidences must lie in \[0, 1\], got 1.0(1|09)"),
            (2, 4, r"labels must lie in \[0, 3\] or be 255 \(ignored\), got 4"),
            (2, -1, r"labels must lie in \[0, 3\] or be 255 \(ignored\), got -1"),
        ],
    )
    def test_values(self, place, value, match, backend):
        for where in (0, -1):
            args = [x.clone() for x in example(2, 4, 17, 17)]
            args[place].view(-1)[where] = value
            with pytest.raises(ValueError, match="psl_loss: " + match):
                psl_loss(*args, backend=backend)


def test_gradcheck():
    logits, confidences, labels, present = example(2, 4, 3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: psl_loss(x, confidences, labels, present)[:2], logits.requires_grad_())


@native
def test_float64_goes_to_the_reference():
    args = example(1, 4, 6, 7, dtype=torch.float64)
    assert psl_loss(*args).labelled.dtype == torch.float64
    with pytest.raises(TypeError, match="psl_loss: the native backend takes fp32, bf16 and fp16; use"):
        psl_loss(*args, backend="native")


@native
def test_bits_depend_on_neither_threads_nor_run_nor_memory_nor_batch():
    args = example(3, 5, 100, 130)
    want = run(*args, backend="native")
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert all(equal(run(*args, backend="native"), want) for _ in range(5))
        torch.use_deterministic_algorithms(True)  # fills every fresh tensor with NaN
        assert torch.empty(3).isnan().all()
        assert equal(run(*args, backend="native"), want)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)
    for i in range(3):
        out, gradient = run(*(x[i : i + 1] for x in args), backend="native")
        assert all(torch.equal(x[0], y[i]) for x, y in zip(out, want[0], strict=True))
        assert torch.equal((i + 1) * gradient[0], want[1][i]) or i > 0


@native
def test_a_large_gradient():
    """Its memory is mapped anew: more than 32 MiB."""
    args = example(2, 21, 460, 460)
    got, want = run(*args, backend="native"), exact(*args)
    assert got[1].numel() * 4 > 2**25
    assert_near(got, want)


@native
def test_opcheck():
    ops = torch.ops.wsss
    for dtype in (torch.float32, torch.bfloat16):
        logits, confidences, labels, present = example(2, 4, 6, 7, dtype=dtype)
        weights = torch.nn.functional.pad(confidences.log(), (1, 0))
        torch.library.opcheck(ops.psl_loss.default, (logits.clone().requires_grad_(), weights, labels, present, 255))
        *losses, mask, counts = ops.psl_loss(logits, weights, labels, present, 255)
        backward = *losses, logits, labels, present, mask, counts, 255
        torch.library.opcheck(ops.psl_loss_backward.default, backward)


@native
def test_second_gradient_is_refused():
    logits, *rest = example(2, 4, 6, 7)
    out = psl_loss(logits.requires_grad_(), *rest, backend="native")
    weight = torch.ones(2, requires_grad=True)
    (gradient,) = torch.autograd.grad(out.labelled, logits, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="psl_loss: the gradient itself is not differentiable"):
        gradient.sum().backward()


@native
@pytest.mark.parametrize(
    ("place", "value", "error", "match"),
    [
        (0, torch.zeros(2, 4, 6), ValueError, r"logits must be \[B, K, H, W\] with K in \[1, 255\]"),
        (0, torch.zeros(2, 0, 6, 7), ValueError, r"logits must be \[B, K, H, W\] with K in \[1, 255\]"),
        (0, torch.zeros(2, 256, 6, 7), ValueError, r"logits must be \[B, K, H, W\] with K in \[1, 255\]"),
        (0, torch.zeros(2, 4, 6, 7).int(), TypeError, "logits must be floating point"),
        (0, torch.zeros(2, 4, 6, 7).double(), TypeError, "logits must be fp32, bf16 or fp16, got Double"),
        (2, torch.zeros(2, 6, 6).long(), ValueError, r"labels must be \[2, 6, 7\]"),
        (2, torch.zeros(2, 6, 7).int(), TypeError, "labels must be Long, got Int"),
        (3, torch.zeros(2, 4).bool(), ValueError, r"present must be \[2, 3\]"),
        (3, torch.zeros(2, 3), TypeError, "present must be Bool, got Float"),
        (1, torch.zeros(2, 3), ValueError, r"log_weights must be \[2, 4\]"),
        (1, torch.zeros(2, 4).double(), TypeError, "log_weights must be Float, got Double"),
    ],
)
def test_direct_call_is_checked(place, value, error, match):
    args = [torch.zeros(2, 4, 6, 7), torch.zeros(2, 4), torch.zeros(2, 6, 7).long(), torch.zeros(2, 3).bool(), 255]
    args[place] = value
    with pytest.raises(error, match="psl_loss: " + match):
        torch.ops.wsss.psl_loss(*args)
    if place != 1:
        mask, counts = torch.zeros(2, 6, 7).byte(), torch.zeros(2, 2).long()
        with pytest.raises(error, match="psl_loss_backward: " + match):
            torch.ops.wsss.psl_loss_backward(torch.zeros(2), torch.zeros(2), args[0], *args[2:4], mask, counts, 255)


@native
def test_direct_backward_is_checked():
    losses = torch.zeros(2), torch.zeros(2)
    rest = torch.zeros(2, 4, 6, 7), torch.zeros(2, 6, 7).long(), torch.zeros(2, 3).bool()
    mask, counts = torch.zeros(2, 6, 7).byte(), torch.zeros(2, 2).long()
    call = torch.ops.wsss.psl_loss_backward
    for wrong, match in (
        ((losses[0][:1], losses[1], *rest, mask, counts), r"grad_labelled must be \[2\]"),
        ((losses[0], losses[1][:1], *rest, mask, counts), r"grad_online must be \[2\]"),
        ((*losses, *rest, mask[:1], counts), r"mask must be \[2, 6, 7\]"),
        ((*losses, *rest, mask, counts[:1]), r"counts must be \[2, 2\]"),
    ):
        with pytest.raises(ValueError, match="psl_loss_backward: " + match):
            call(*wrong, 255)
    # a mask with classes that do not exist counts nothing there
    assert not call(*losses, *rest, mask + 255, counts, 255).any()


@pytest.mark.parametrize(
    ("place", "value", "error", "match"),
    [
        (0, torch.zeros(2, 4, 6), ValueError, r"logits must be \[B, K, H, W\], got \(2, 4, 6\)"),
        (0, torch.zeros(2, 4, 6, 7).int(), TypeError, "logits must be floating point"),
        (0, torch.zeros(2, 0, 6, 7), ValueError, "logits must have 1 to 255 classes, got 0"),
        (0, torch.zeros(2, 256, 6, 7), ValueError, "logits must have 1 to 255 classes, got 256"),
        (1, torch.zeros(2, 4), ValueError, r"confidences must be \[2, 3\], got \(2, 4\)"),
        (1, torch.zeros(2, 3).int(), TypeError, "confidences must be floating point"),
        (2, torch.zeros(2, 7, 6).int(), ValueError, r"labels must be \[2, 6, 7\], got \(2, 7, 6\)"),
        (2, torch.zeros(2, 6, 7), TypeError, "labels must hold integers"),
        (3, torch.zeros(2, 4), ValueError, r"present must be \[2, 3\], got \(2, 4\)"),
        (3, torch.zeros(2, 3) + 0j, TypeError, "present must hold real numbers"),
        (3, torch.zeros(2, 3, device="meta"), ValueError, "tensors must be on one device"),
        (3, None, TypeError, "present must be a tensor, got NoneType"),
    ],
)
def test_errors(place, value, error, match):
    args = [torch.zeros(2, 4, 6, 7), torch.zeros(2, 3), torch.zeros(2, 6, 7).long(), torch.zeros(2, 3)]
    args[place] = value
    with pytest.raises(error, match="psl_loss: " + match):
        psl_loss(*args)


def test_other_errors():
    args = example(2, 4, 6, 7)
    with pytest.raises(ValueError, match="psl_loss: ignore_index must be an integer, got 0.5"):
        psl_loss(*args, ignore_index=0.5)
    psl_loss(args[0], torch.full_like(args[1], 1 + 5e-6), *args[2:])  # so far a softmax may round


@pytest.mark.parametrize("case", [(2, 2, 7, 8), (2, 6, 20, 21)])
def test_bench_peer_agrees(case, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", {"tiny": case})
    bench.expected.cache_clear()
    peer = bench.peers("tiny", torch.device("cpu"))["eager"]
    assert bench.peer_error("tiny", torch.device("cpu"), "eager", peer()) < 1e-6
    bench.expected.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_equals_the_cpu(size, dtype):
    args = example(*size, dtype=dtype)
    want = run(*args, backend="native")
    moved = [x.cuda() for x in args]
    runs = (run(*moved, backend="native") for _ in range(2))
    got, again = ((PSLLoss(*(x.cpu() for x in out)), gradient.cpu()) for out, gradient in runs)
    assert equal(got, again)
    assert_near(got, want, max(torch.finfo(dtype).eps, 2e-6))
