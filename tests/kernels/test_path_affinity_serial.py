"""The CUDA code of path_affinity_loss without a GPU: the very kernel bodies and the very sequence of launches, run item
by item on the host (serial_device.h), against the reference."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kernels import path_affinity_counts
from tests.kernels.test_path_affinity_loss import CPU_BACKENDS, SIZES, assert_near, equal, example, run

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    """The CUDA code on the host; serial_device.h."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("serial") / "path_affinity_serial.so"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    command = ["c++", *flags, f"-I{HERE.parents[1] / 'csrc'}", f"-I{HERE}", HERE / "path_affinity_serial.cpp"]
    done = subprocess.run([*command, "-o", library], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library)).path_affinity_serial


def run_serial(serial, logits, labels, radius, ignore_index=255, counts=None, order=0):
    """Loss, gradient, counts of the loss and counts of the labels."""
    b, h, w = logits.shape
    own, won = torch.zeros(3, dtype=torch.int64), torch.zeros(b, h, w, 3, dtype=torch.int32)
    kinds = torch.full((b * max(h - radius + 1, 0) * max(w - 2 * radius + 2, 0), 3), -1, dtype=torch.int32)
    losses, slopes = torch.full((b, h, w), torch.nan).double(), torch.full((b, h, w), torch.nan)
    logits, labels, sizes = logits.contiguous(), labels.contiguous(), torch.tensor([b, h, w])
    tensors = (sizes, counts, own, kinds, won, losses, slopes)
    sizes, counts, *rest = (None if x is None else ctypes.c_void_p(x.data_ptr()) for x in tensors)
    first = (ctypes.c_void_p(logits.data_ptr()), ctypes.c_void_p(labels.data_ptr()), ctypes.c_int64(ignore_index))
    serial(*first, sizes, radius, counts, *rest, order)
    return losses.sum().float(), slopes, own, kinds.sum(0)


@pytest.mark.parametrize(("h", "w", "radius"), SIZES)
def test_the_cuda_code_on_the_host(serial, h, w, radius):
    logits, labels = example(2, h, w)
    logits = torch.where(torch.rand(2, h, w) < 0.5, logits.round(), logits)  # ties
    want = run(logits.double(), labels, "reference", radius=radius)
    counts = path_affinity_counts(labels, radius=radius, backend="reference")
    for order in range(3):
        loss, gradient, own, kinds = run_serial(serial, logits, labels, radius, order=order)
        assert_near((loss, gradient), want, 3e-7)
        assert torch.equal(own, counts) and torch.equal(kinds, counts)
    given = counts + torch.tensor([5, 0, 7])
    assert_near(
        run_serial(serial, logits, labels, radius, counts=given)[:2],
        run(logits.double(), labels, "reference", radius=radius, counts=given),
        3e-7,
    )
    if "native" in CPU_BACKENDS:
        assert torch.equal(gradient, run(logits, labels, "native", radius=radius)[1])


def test_the_cuda_code_ignores_labels_out_of_range(serial):
    logits, labels = example(1, 9, 14)
    want = run_serial(serial, logits, labels, 3)
    for wrong in (-1, 32767, 2**40):
        assert equal(run_serial(serial, logits, torch.where(labels == 255, wrong, labels), 3), want)
