"""Random arguments for the fuzz tests: tensors of odd layouts and values, numbers at the ends of their ranges."""

from __future__ import annotations

import contextlib
import os

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("WSSS_FUZZ_EXAMPLES", "0"))
# In the suite the examples are few and the same every time.
fuzz = settings(
    max_examples=EXAMPLES or 25,
    deadline=None,
    database=None,
    derandomize=EXAMPLES == 0,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.uint8, torch.int32, torch.int64)
DTYPES = (*FLOATS, *INTEGERS, torch.bool, torch.complex64)
BIG = 2**62
SIZES = st.sampled_from((0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 12))
# For raw calls: wrong numbers and the ends of int64, where products overflow.
INTS = st.sampled_from((-(2**63), -(2**40), -1, 0, 1, 2, 3, 5, 8, 9, BIG, BIG + 1, 2**63 - 1))
SIGMAS = st.sampled_from((float("nan"), -1.0, 0.0, 1e-300, 1e-40, 1e-6, 1e-3, 0.1, 1.0, 80.0, 1e300, float("inf")))
RADII = st.sampled_from((0.0, 0.5, 1.0, 2**0.5, 2.0, 3.7, 5**0.5, 8.0, 100.0, 1e9, 1e300))
METRICS = st.sampled_from(("euclidean", "euclidean_open", "chebyshev"))
LAYOUTS = ("plain", "plain", "permuted", "strided", "offset", "flipped", "expanded")


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fill(shape, kind: str, make: torch.Generator) -> torch.Tensor:
    """float64 values: `unit` in [0, 1], `tame` normal, the others as they are called."""
    if kind == "unit":
        return torch.rand(shape, generator=make, dtype=torch.float64)
    x = torch.randn(shape, generator=make, dtype=torch.float64)
    if kind == "zero":
        return torch.zeros_like(x)
    if kind == "steps":  # few values, so many ties
        return (2 * x).round()
    if kind in ("huge", "denormal"):
        return x * (1e30 if kind == "huge" else 1e-40)
    if kind == "broken":
        wrong = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, 0.0], dtype=torch.float64)
        place = torch.randint(0, 10, x.shape, generator=make)
        return torch.where(place < 5, wrong[place.clamp_max(4)], x)
    assert kind == "tame"
    return x


def layout(x: torch.Tensor, how: str) -> torch.Tensor:
    """The values of `x` (`expanded`: of its first row) in other places of the memory."""
    if how == "permuted" and x.dim() > 1:
        order = [*range(1, x.dim()), 0]
        return x.permute(order).contiguous().permute([x.dim() - 1, *range(x.dim() - 1)])
    if how == "strided" and x.dim() > 0:
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]
    if how == "offset":
        store = x.new_zeros(x.numel() + 3)
        store[3:] = x.flatten()
        return store[3:].view(x.shape)
    if how == "flipped" and x.dim() > 0:
        return x.flip(-1)
    if how == "expanded" and x.dim() > 0 and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    return x


@st.composite
def tensors(draw, shape, kinds=("tame",), dtypes=(torch.float32,)):
    make = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = fill(shape, draw(st.sampled_from(kinds)), make)
    dtype = draw(st.sampled_from(dtypes))
    if not dtype.is_floating_point and not dtype.is_complex:
        x = x.nan_to_num(0, 3, -3).clamp(-300, 300)
    if dtype == torch.bool:
        x = x > 0.5
    return layout(x.to(dtype), draw(st.sampled_from(LAYOUTS)))


@st.composite
def bools(draw, shape, share=0.3):
    """bool, at times a view of bytes other than 0 and 1."""
    make = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = torch.rand(shape, generator=make) < share
    if draw(st.integers(0, 3)) == 0:
        x = (x * torch.randint(1, 256, shape, generator=make)).to(torch.uint8).view(torch.bool)
    return layout(x, draw(st.sampled_from(LAYOUTS)))


@st.composite
def anything(draw):
    """A tensor that an op need not want."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=5)))
    x = draw(tensors(shape, ("tame", "unit", "broken", "zero"), DTYPES))
    where = draw(st.integers(0, 7))
    if where == 0:
        return x.to("meta")
    return x.to_sparse() if where == 1 and x.dim() > 0 else x


@st.composite
def or_other(draw, good, other, odds=9):
    """`good`, once in a while `other`."""
    return draw(other if draw(st.integers(0, odds)) == 0 else good)


def wanted_or_any(good):
    return or_other(good, anything())
