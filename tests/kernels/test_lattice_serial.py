"""The CUDA code of lattice_filter and dense_crf without a GPU: the very kernel bodies and the very sequence of
launches, run item by item on the host (serial_device.h), against the references. Left to the GPU are the launch, the
sort and the scan in cuda_device.cuh."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kernels import dense_crf
from kernels.lattice import Lattice, pixel_features

HERE = Path(__file__).parent
FORWARD, BACKWARD, SCATTERED = range(3)  # the order of the items of a launch
SIGMAS = (40.3, 17.7)  # few points lie on the borders of lattice cells
CRF = {"spatial": (3.1, 3.0), "bilateral": (*SIGMAS, 6.0), "iterations": 3}

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("serial") / "lattice_serial.so"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    command = ["c++", *flags, f"-I{HERE.parents[1] / 'csrc'}", f"-I{HERE}", HERE / "lattice_serial.cpp", "-o", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(path))
    loaded.bytes_at_most.restype = loaded.reads.restype = ctypes.c_int64
    return loaded


def pointer(x):
    return ctypes.c_void_p(x.data_ptr())


def longs(*values):
    return [ctypes.c_int64(v) for v in values]


class Serial:
    """The two ops as the bindings call them; ValueError where the keys do not fit."""

    def __init__(self, library):
        self.library = library

    def filter(self, image, planes, sigmas=SIGMAS, order=FORWARD, images_at_once=1 << 30):
        image, planes = image.contiguous(), planes.contiguous()
        out = torch.full_like(planes, torch.nan)
        self.check(
            self.library.lattice_filter_serial(
                *map(pointer, (image, planes, out)),
                *longs(*planes.shape),
                *map(ctypes.c_float, sigmas),
                *longs(images_at_once),
                order,
            )
        )
        return out

    def crf(self, unary, image, spatial, bilateral, iterations, prune=0.0, sizes=None, order=FORWARD, at_once=1 << 30):
        unary, image = unary.contiguous(), image.float().contiguous()
        out = torch.full_like(unary, torch.nan) if sizes is None else torch.zeros_like(unary)
        params = torch.tensor([*spatial, *bilateral, prune])
        flat = None if sizes is None else torch.tensor(sizes).flatten()
        self.check(
            self.library.dense_crf_serial(
                *map(pointer, (unary, image, out)),
                *longs(*unary.shape),
                pointer(params),
                *longs(iterations),
                None if sizes is None else pointer(flat),
                *longs(at_once),
                order,
            )
        )
        return out

    @staticmethod
    def check(fits):
        if not fits:
            raise ValueError("the features span too many cells")


@pytest.fixture
def serial(library):
    return Serial(library)


def scene(b, k, h, w, alive=None):
    """Unaries and an image of two regions plus noise; classes from `alive` on have probabilities near 1e-5."""
    image = torch.full((b, 3, h, w), 60.0)
    image[..., w // 2 :] = 170.0
    image = image + 8 * torch.randn(b, 3, h, w)
    scores = torch.nn.functional.interpolate(2 * torch.randn(b, k, 4, 4), (h, w))
    scores[:, 0, :, : w // 2] += 1.0
    unary = -scores.log_softmax(1)
    if alive is not None:
        unary[:, alive:] += 11.5
    return unary, image


def lattice_filter(image, planes, sigmas=SIGMAS):
    """The reference, in the dtype of the arguments."""
    sums = [Lattice(pixel_features(i, *sigmas)).filter(p.flatten(1).t()) for i, p in zip(image, planes, strict=True)]
    return torch.stack([s.t().reshape(planes.shape[1:]) for s in sums])


def assert_close(got, want):
    """Sums of up to thousands of terms in fp32, relative to the largest."""
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("shape", [(2, 3, 20, 31), (1, 8, 1, 17), (3, 1, 9, 1), (1, 33, 12, 10), (2, 2, 1, 1)])
@pytest.mark.parametrize("sigmas", [(50.0, 15.0), (3.0, 200.0), (80.0, 1.0)])
def test_filter_equals_the_reference(serial, shape, sigmas):
    b, _, h, w = shape
    image, planes = 255 * torch.rand(b, 3, h, w), torch.randn(shape)
    assert_close(serial.filter(image, planes, sigmas), lattice_filter(image, planes, sigmas))


def test_filter_equals_the_reference_in_fp64(serial):
    image, planes = 255 * torch.rand(2, 3, 24, 31), torch.rand(2, 5, 24, 31)
    want = lattice_filter(image.double(), planes.double())
    assert (serial.filter(image, planes) - want).abs().max() < 1e-4 * want.abs().max()  # fp32 coordinates carry 3e-5


def test_integer_colours_lie_on_ties(serial):
    # Simplices of equal features must be those of the reference, which breaks ties by the order of the coordinates.
    image, planes = torch.randint(0, 256, (1, 3, 24, 31)).float(), torch.randn(1, 4, 24, 31)
    for sigmas in ((80.0, 13.0), (50.0, 5.0), (64.0, 4.0)):
        assert_close(serial.filter(image, planes, sigmas), lattice_filter(image, planes, sigmas))


def test_hot_vertices(serial):
    # A flat image: each vertex has thousands of entries, in many chunks; and the sums keep their precision.
    image = torch.full((2, 3, 90, 100), 60.0)
    image[1, :, :, 50:] = 200.0
    planes = torch.rand(2, 3, 90, 100) + 1
    want = lattice_filter(image.double(), planes.double(), (400.3, 20.7))
    got = serial.filter(image, planes, (400.3, 20.7))
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    lattice = Lattice(pixel_features(image[0], 400.3, 20.7))
    assert lattice.bag_start.diff().max() > 5000


@pytest.mark.parametrize("k", [1, 2, 4, 5, 21, 27])
@pytest.mark.parametrize("size", [(24, 31), (1, 40), (40, 1), (1, 1)])
def test_crf_equals_the_reference(serial, k, size):
    unary, image = scene(2, k, *size)
    got = serial.crf(unary, image, **CRF)
    want = dense_crf(unary.double(), image.double(), **CRF, backend="reference")
    assert (got - want).abs().max() < 1e-4  # exponents reach 30, coordinates carry 3e-5
    torch.testing.assert_close(got.sum(1), torch.ones(2, *size), rtol=0, atol=1e-5)


def test_crf_at_the_usual_settings(serial):
    unary, image = scene(1, 5, 40, 48)
    for options in ({}, {"spatial": (1.0, 1.0), "bilateral": (140.0, 1.0, 7.0)}, {"bilateral": (50.0, 5.0, 10.0)}):
        settings = {"spatial": (3.0, 3.0), "bilateral": (80.0, 13.0, 10.0), "iterations": 3, **options}
        plain = dense_crf(unary, image, **settings, backend="reference")
        got = serial.crf(unary, image, **settings)
        assert (got - plain).abs().max() < 5e-4 and (got - plain).abs().mean() < 2e-6  # as for the CPU code


def test_crf_without_kernels_or_iterations(serial):
    unary, image = scene(1, 3, 12, 13)
    off = {"spatial": (3.0, 0.0), "bilateral": (80.0, 13.0, 0.0)}
    for options in (off, {"spatial": (3.0, 0.0)}, {"bilateral": (80.0, 13.0, 0.0)}, {"iterations": 0}):
        settings = {**CRF, **options}
        want = dense_crf(unary, image, **settings, backend="reference")
        torch.testing.assert_close(serial.crf(unary, image, **settings), want, rtol=0, atol=1e-5)
        if options in (off, {"iterations": 0}):
            pruned = serial.crf(unary, image, **settings, prune=0.1)
            torch.testing.assert_close(pruned, (-unary).softmax(1), rtol=0, atol=1e-6)


def test_crf_large_energies(serial):
    unary, image = scene(1, 4, 12, 13)
    for u in (1000 * unary, unary + 1e4, -50 * unary):
        want = dense_crf(u, image, **CRF, backend="reference")
        torch.testing.assert_close(serial.crf(u, image, **CRF), want, rtol=0, atol=2e-3)  # fp32 carries 1e-3 at 1e4


SIZES = [(9, 14), (11, 7), (11, 14), (0, 5), (9, 14), (1, 1)]


@pytest.mark.parametrize("prune", [0.0, 1e-3])
def test_images_of_different_sizes(serial, prune):
    unary, image = scene(len(SIZES), 6, 11, 14, alive=3)
    unary[2, 5] -= 11.5  # alive in one image alone
    got = serial.crf(unary, image, **CRF, prune=prune, sizes=SIZES)
    assert torch.equal(got, serial.crf(unary, image, **CRF, prune=prune, sizes=SIZES, at_once=2))
    want = dense_crf(unary.double(), image.double(), **CRF, prune=prune, sizes=SIZES, backend="reference")
    assert (got - want).abs().max() < 1e-4
    for n, (h, w) in enumerate(SIZES):
        alone = serial.crf(unary[n : n + 1, :, :h, :w], image[n : n + 1, :, :h, :w], **CRF, prune=prune)
        assert torch.equal(got[n, :, :h, :w], alone[0])


def test_prune(serial):
    unary, image = scene(2, 12, 30, 26, alive=3)
    settings = {**CRF, "iterations": 1}
    full = serial.crf(unary, image, **settings)
    for prune in (1e-3, 0.1):
        got = serial.crf(unary, image, **settings, prune=prune)
        assert not torch.equal(got, full)
        assert (got.log() - full.log()).abs().max() < 1.12 * prune + 1e-5  # the documented bound; 1e-5 for rounding
        want = dense_crf(unary.double(), image.double(), **settings, prune=prune, backend="reference")
        assert (got - want).abs().max() < 1e-4
    assert torch.equal(full, serial.crf(unary, image, **settings, prune=1e-9))  # nothing dropped, the same bits


def test_prune_of_every_class(serial):
    unary, image = scene(1, 3, 6, 5)
    got = serial.crf(unary, image, (3.0, 1e-3), (80.0, 13.0, 1e-3), 3, prune=0.1)
    torch.testing.assert_close(got, (-unary).softmax(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [7, 26])
def test_items_are_independent(serial, k):
    # A launch whose items read what others write would give other bits in another order.
    unary, image = scene(3, k, 13, 21, alive=4)
    for run in (
        lambda order: serial.crf(unary, image, **CRF, prune=1e-3, order=order),
        lambda order: serial.filter(image, unary, order=order),
    ):
        want = run(FORWARD)
        assert torch.equal(want, run(BACKWARD)) and torch.equal(want, run(SCATTERED))


def test_batch_position(serial):
    unary, image = scene(3, 9, 13, 21, alive=4)
    order = [2, 0, 1]
    for at_once in (3, 1):
        want = serial.filter(image, unary)
        assert torch.equal(want[order], serial.filter(image[order], unary[order], images_at_once=at_once))
        want = serial.crf(unary, image, **CRF, prune=1e-3)
        assert torch.equal(want[order], serial.crf(unary[order], image[order], **CRF, prune=1e-3, at_once=at_once))


def test_too_small_deviations(serial):
    unary, image = scene(2, 2, 9, 8)
    for sigmas in ((80.0, 1e-4), (80.0, 0.01), (1e-7, 13.0)):
        with pytest.raises(ValueError, match="features span too many cells"):
            serial.filter(image, unary, sigmas)
        with pytest.raises(ValueError, match="features span too many cells"):
            Lattice(pixel_features(image[1], *sigmas))
    for options in ({"bilateral": (80.0, 0.01, 10.0)}, {"spatial": (1e-7, 3.0)}):
        with pytest.raises(ValueError, match="features span too many cells"):
            serial.crf(unary, image, **{**CRF, **options})
    with pytest.raises(ValueError, match="features span too many cells"):
        serial.filter(image * torch.nan, unary)


def test_keys_that_fit_alone_but_not_together(serial, library):
    # The keys of an image grow with the fifth power of 1 / sigma_rgb: between 63 bits for eight images and 63 bits for
    # one there is room for a factor of 1.5. Such a batch is worked on in parts.
    image, planes = torch.rand(8, 3, 6, 7) * 255, torch.randn(8, 2, 6, 7)
    image[:, :, 0, 0], image[:, :, 0, 1] = 0.0, 255.0
    sigma_rgb, parts = 1.0, []
    while True:
        library.reads()
        try:
            got = serial.filter(image, planes, (40.3, sigma_rgb))
        except ValueError:
            break
        parts.append(library.reads())
        assert_close(got, lattice_filter(image, planes, (40.3, sigma_rgb)))
        sigma_rgb /= 1.25
    assert parts[0] == 1 and parts[-1] > 1
    with pytest.raises(ValueError, match="features span too many cells"):
        lattice_filter(image, planes, (40.3, sigma_rgb))


def test_the_host_waits_once_per_part(serial, library):
    unary, image = scene(2, 3, 6, 7)
    for run, reads in (
        (lambda: serial.filter(image, unary), 1),
        (lambda: serial.filter(image, unary, images_at_once=1), 2),
        (lambda: serial.crf(unary, image, **CRF), 1),
        (lambda: serial.crf(unary, image, **CRF, prune=1e-3), 2),
    ):
        library.reads()
        run()
        assert library.reads() == reads


def test_memory(serial, library):
    b, k, h, w = 1, 21, 60, 80
    unary, image = scene(b, k, h, w)
    library.bytes_at_most()
    serial.crf(unary, image, **CRF)
    small = 21 * 4 * 3 * 4096  # partial results of a few kilobytes that do not grow with the image
    assert library.bytes_at_most() < 8 * 4 * b * k * h * w + 6 * 12 * b * h * w + small
