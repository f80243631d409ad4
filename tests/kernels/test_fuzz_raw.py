"""Random arguments for torch.ops.wsss.*, past the checks of the public functions: a result or an exception, no crash.

WSSS_FUZZ_EXAMPLES as in test_fuzz.py.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import available_backends
from tests.kernels.fuzzing import (
    BIG,
    FLOATS,
    INTEGERS,
    INTS,
    SIGMAS,
    SIZES,
    anything,
    bools,
    fuzz,
    or_other,
    tensors,
    threads,
    wanted_or_any,
)

KINDS = ("tame", "unit", "zero", "steps", "huge", "denormal", "broken")
WEIGHTS = st.floats(allow_nan=True, allow_infinity=True)
pytestmark = pytest.mark.skipif("native" not in available_backends("par"), reason="kernels._C is not built")


def floats(shape, dtypes=(torch.float32,)):
    return wanted_or_any(tensors(shape, KINDS, dtypes))


def small(low, high):
    """Numbers that an op takes; now and then any other of int64."""
    return or_other(st.integers(low, high), INTS)


@st.composite
def par(draw):
    b, c, h, w = draw(st.tuples(st.integers(0, 2), st.integers(0, 5), SIZES, st.integers(0, 35)))
    dilations = draw(st.lists(small(1, 24), min_size=0, max_size=draw(st.sampled_from((3, 3, 40)))))
    place = draw(st.lists(WEIGHTS, max_size=3)) if draw(st.integers(0, 9)) == 0 else [0.1] * (8 * len(dilations))
    iterations = draw(st.sampled_from((-(2**63), -1, 0, 1, 2)))
    return draw(floats((b, 3, h, w))), draw(floats((b, c, h, w))), dilations, place, iterations


@st.composite
def dense_crf(draw):
    b, k, h, w = draw(st.tuples(st.integers(0, 3), st.integers(0, 20), SIZES, st.integers(0, 20)))
    unary, image = draw(floats((b, k, h, w))), draw(floats((b, 3, h, w)))
    numbers = [draw(SIGMAS), draw(WEIGHTS), draw(SIGMAS), draw(SIGMAS), draw(WEIGHTS)]
    sizes = draw(st.just([]) | st.lists(small(0, 9), min_size=2 * b, max_size=2 * b) | st.lists(INTS, max_size=5))
    rest = draw(st.sampled_from((-(2**63), -1, 0, 1, 2))), draw(WEIGHTS), sizes
    return unary, image, *numbers, *rest, draw(st.sampled_from(("fast", "fast", "ring", "exact", "", "Fast")))


@st.composite
def gaussian_filter(draw):
    b, k, h, w = draw(st.tuples(st.integers(0, 3), st.integers(0, 20), SIZES, st.integers(0, 20)))
    return draw(floats((b, 3, h, w))), draw(floats((b, k, h, w))), draw(SIGMAS), draw(SIGMAS)


@st.composite
def patch_token_contrast(draw):
    b, n, d = draw(st.tuples(st.integers(0, 3), st.integers(0, 70), st.integers(0, 40)))
    labels = wanted_or_any(tensors((b, n), ("steps",), INTEGERS))
    return draw(floats((b, n, d), FLOATS)), draw(labels), draw(small(-2, 255)), draw(st.booleans())


@st.composite
def class_patch_contrast(draw):
    b, c, n, d = draw(st.tuples(st.integers(0, 3), st.integers(0, 20), st.integers(0, 70), st.integers(0, 40)))
    tokens = draw(floats((b, c, d), FLOATS)), draw(floats((b, n, d), FLOATS))
    labels = draw(wanted_or_any(tensors((b, n), ("steps",), INTEGERS)))
    return *tokens, labels, draw(wanted_or_any(bools((b, c)))), draw(small(-2, 255)), draw(st.booleans())


@st.composite
def lattice_filter(draw):
    b, k, h, w = draw(st.tuples(st.integers(0, 3), st.integers(0, 20), SIZES, st.integers(0, 20)))
    return draw(floats((b, 3, h, w))), draw(floats((b, k, h, w))), draw(SIGMAS), draw(SIGMAS)


@st.composite
def dense_energy(draw):
    b, k, full_h, full_w = draw(st.tuples(st.integers(0, 3), st.integers(0, 40), SIZES, st.integers(0, 20)))
    h, w = draw(st.tuples(SIZES, SIZES) | st.just((full_h // 2, full_w // 2)))
    planes = draw(floats((b, k, full_h, full_w))), draw(floats((b, 3, h, w))), draw(floats((b, h, w)))
    return *planes, draw(wanted_or_any(bools((b, h, w)))), draw(SIGMAS), draw(SIGMAS), draw(st.booleans())


@st.composite
def dense_energy_backward(draw):
    b, k = draw(st.tuples(st.integers(0, 3), st.integers(0, 40)))
    h, w, full_h, full_w = draw(st.tuples(*4 * (st.integers(1, 9),)))
    full_h, full_w = draw(st.sampled_from(((full_h, full_w), (2 * h, 2 * w))))
    rest = (k - 1) % 32 + 1
    floats_of_rows = (k - rest + (4 if rest <= 4 else -(-rest // 8) * 8)) * h * w
    shape = draw(st.just([b, k, full_h, full_w]) | st.lists(small(0, 9), max_size=5))
    return draw(floats(())), draw(floats((b, floats_of_rows))), shape, draw(small(h, h)), draw(small(w, w))


@st.composite
def random_walk(draw):
    b, c, h, w = draw(st.tuples(st.integers(0, 3), st.integers(0, 6), SIZES, st.integers(0, 35)))
    tails = draw(st.just([]) | st.lists(WEIGHTS, max_size=4))
    steps = draw(st.sampled_from((-1, 0, 1, 3, BIG)))
    beta = draw(WEIGHTS | st.just(10.0))
    rest = draw(small(1, 16)), beta, steps, tails, draw(st.booleans())
    return draw(floats((b, c, h, w))), draw(floats((b, h, w))), *rest


@st.composite
def grids(draw):
    """(h, w, N) with h * w = N most of the time, at times only when the product overflows."""
    h, w = draw(st.tuples(st.integers(0, 5), st.integers(0, 6)))
    wrong = st.tuples(INTS, INTS, st.just(h * w)) | st.just((BIG + 1, 4, 4)) | st.just((2**32, 2**32, 0))
    return draw(or_other(st.just((h, w, h * w)), wrong))


@st.composite
def radius_mask(draw):
    h, w, n = draw(grids())
    b = draw(st.integers(0, 2))
    return draw(floats((b, n, n), FLOATS)), h, w, draw(small(-1, 30)), draw(st.booleans())


@st.composite
def radius_mask_backward(draw):
    h, w, n = draw(grids())
    shape, dtype = (draw(st.integers(0, 2)), n, n), (draw(st.sampled_from(FLOATS)),)
    return draw(floats(shape, dtype)), draw(floats(shape, dtype)), h, w, draw(small(-1, 30)), draw(st.booleans())


@st.composite
def dilate_regions(draw):
    shape = draw(st.tuples(st.integers(0, 3), st.integers(0, 12), SIZES, st.integers(0, 140)))
    return draw(wanted_or_any(bools(shape))), draw(small(-1, 200)), draw(st.booleans())


def pair_lists(num_pairs, images, classes):
    image, label = st.integers(0, max(images - 1, 0)), st.integers(0, max(classes - 1, 0))
    row = st.tuples(or_other(image, INTS, 20), or_other(label, INTS, 20))
    rows = st.lists(row, min_size=num_pairs, max_size=num_pairs)
    return wanted_or_any(rows.map(lambda r: torch.tensor(r, dtype=torch.int64).view(-1, 2)))


@st.composite
def select_regions(draw):
    h, w, n = draw(grids())
    b, c, p = draw(st.tuples(st.integers(0, 3), st.integers(0, 20), st.integers(0, 4)))
    numbers = [draw(small(-1, 30)), draw(WEIGHTS), draw(WEIGHTS), draw(WEIGHTS)]
    # Larger ones allocate what they are asked for.
    max_seeds, top = draw(st.sampled_from((-1, 0, 1, 3, 40, BIG))), draw(small(1, 20))
    tensors_ = draw(floats((b, n, n), FLOATS)), draw(floats((b, n, c))), draw(pair_lists(p, b, c))
    return *tensors_, h, w, *numbers, max_seeds, top


OUT_SIZES = st.sampled_from((-1, 0, 1, 2, 7, 8, 9, 33, BIG))


@st.composite
def max_upsampled_masks(draw):
    h, w, n = draw(grids())
    b, p = draw(st.tuples(st.integers(0, 3), st.integers(0, 4)))
    tensors_ = draw(floats((b, n, n), FLOATS)), draw(pair_lists(p, b, 5)), draw(wanted_or_any(bools((p, n))))
    return *tensors_, h, w, draw(OUT_SIZES), draw(OUT_SIZES), draw(small(-1, 30))


@st.composite
def max_upsampled_masks_backward(draw):
    h, w, n = draw(grids())
    b, p, out_h, out_w = draw(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 20), st.integers(0, 20)))
    make = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    high = draw(st.sampled_from((n, n, n + 1, 2**31 - 1)))  # an index too large is among them now and then
    winner = torch.randint(-1, max(high, 1), (p, out_h, out_w), generator=make, dtype=torch.int32)
    dtype = draw(st.sampled_from(FLOATS))
    grad = draw(floats((p, out_h, out_w), (torch.float64 if dtype == torch.float64 else torch.float32,)))
    logits = draw(floats((b, n, n), (dtype,)))
    rest = draw(pair_lists(p, b, 5)), draw(wanted_or_any(bools((p, n))))
    return grad, draw(wanted_or_any(st.just(winner))), logits, *rest, h, w, draw(small(-1, 30))


def edge_labels(shape):
    return wanted_or_any(tensors(shape, ("steps", "zero", "unit"), INTEGERS).map(lambda x: x.long().abs().to(x.dtype)))


@st.composite
def path_affinity_counts(draw):
    shape = draw(st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 150)))
    return draw(edge_labels(shape)), draw(small(1, 16)), draw(small(-2, 255))


@st.composite
def path_affinity_loss(draw):
    shape = draw(st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 45)))
    counts = st.none() | st.lists(small(0, 9), min_size=3, max_size=3).map(torch.tensor)
    rest = draw(small(1, 16)), draw(small(-2, 255)), draw(counts | anything()), draw(st.booleans())
    return draw(floats(shape)), draw(edge_labels(shape)), *rest


@st.composite
def psl_loss(draw):
    b, k, h, w = draw(st.tuples(st.integers(0, 3), st.integers(1, 24), SIZES, st.integers(0, 140)))
    logits, weights = draw(floats((b, k, h, w), FLOATS[:3])), draw(floats((b, k)))
    labels = tensors((b, h, w), ("steps", "zero", "unit"), (torch.int64,)).map(lambda x: x.clamp(-1, k))
    positive = labels.map(lambda x: x.abs().clamp(max=k - 1))
    return logits, weights, draw(wanted_or_any(positive | labels)), draw(wanted_or_any(bools((b, k - 1)))), draw(INTS)


@st.composite
def psl_loss_backward(draw):
    logits, _, *rest, ignore_index = draw(psl_loss())
    b, h, w = logits.shape[0] if logits.dim() > 0 else 2, *(logits.shape[2:] if logits.dim() == 4 else (1, 1))
    flows = draw(floats((b,))), draw(floats((b,)))
    mask = draw(wanted_or_any(tensors((b, h, w), ("unit", "steps", "tame"), (torch.uint8,))))
    counts = draw(wanted_or_any(tensors((b, 2), ("steps", "unit"), (torch.int64,))))
    return *flows, logits, *rest, mask, counts, ignore_index


WIDE = (torch.float32, torch.float64)


@st.composite
def erase_maximum(draw):
    shape = draw(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 6)))
    return draw(floats(shape, WIDE)), draw(OUT_SIZES), draw(OUT_SIZES)


@st.composite
def erase_maximum_backward(draw):
    dtype = (draw(st.sampled_from(WIDE)),)
    shape = draw(st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 6)))
    scalars = draw(floats((), dtype)), draw(floats((), dtype))
    return *scalars, draw(floats(shape, dtype)), draw(OUT_SIZES), draw(OUT_SIZES)


@st.composite
def erased(draw):
    """(images, maps) and the type of what is computed."""
    b, h, w, height, width = draw(st.tuples(st.integers(0, 3), *[st.integers(1, 6)] * 2, SIZES, st.integers(0, 35)))
    dtype = draw(st.sampled_from(FLOATS))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return draw(floats((b, 3, height, width), (dtype,))), draw(floats((b, h, w), (wide,))), wide


@st.composite
def erase_soft(draw):
    images, maps, wide = draw(erased())
    return images, maps, draw(floats((), (wide,)))


@st.composite
def erase_soft_backward(draw):
    images, maps, wide = draw(erased())
    grad = draw(floats(tuple(images.shape), (images.dtype,)))
    return grad, images, maps, draw(floats((), (wide,)))


@st.composite
def erase_hard(draw):
    images, maps, _ = draw(erased())
    return images, maps, draw(WEIGHTS)


@st.composite
def c2am_pool(draw):
    b, d, n = draw(st.tuples(st.integers(0, 3), st.integers(0, 70), st.integers(0, 40)))
    dtype = draw(st.sampled_from(FLOATS))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return draw(floats((b, d, n), (dtype,))), draw(floats((b, n), (wide,)))


@st.composite
def c2am_pool_backward(draw):
    features, logits = draw(c2am_pool())
    wide = (logits.dtype if logits.dtype in WIDE else torch.float32,)
    flows = [draw(floats(tuple(features.shape[:2]), wide)) for _ in range(2)]
    return *flows, features, logits


ARGUMENTS = [
    par,
    dense_crf,
    lattice_filter,
    dense_energy,
    dense_energy_backward,
    gaussian_filter,
    patch_token_contrast,
    class_patch_contrast,
    random_walk,
    radius_mask,
    radius_mask_backward,
    dilate_regions,
    select_regions,
    max_upsampled_masks,
    max_upsampled_masks_backward,
    path_affinity_counts,
    path_affinity_loss,
    psl_loss,
    psl_loss_backward,
    erase_maximum,
    erase_maximum_backward,
    erase_soft,
    erase_soft_backward,
    erase_hard,
    c2am_pool,
    c2am_pool_backward,
]


def test_every_op_is_here():
    registered = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("wsss::")}
    assert registered == {f"wsss::{arguments.__name__}" for arguments in ARGUMENTS}


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda f: f.__name__)
def test_fuzz_raw(arguments):
    op = getattr(torch.ops.wsss, arguments.__name__)
    returned = 0

    @fuzz
    @given(arguments(), st.integers(1, 2))
    def body(args, count):
        nonlocal returned
        with threads(count):
            try:
                out = op(*args)
            except Exception as error:
                assert "INTERNAL ASSERT" not in str(error)
                return
        for x in out if isinstance(out, tuple) else (out,):
            x.double().sum()
        returned += 1

    body()
    assert returned > 0  # not only refusals
