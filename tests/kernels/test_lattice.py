"""The lattice against a dictionary-based loop written from the paper, and the exact filter against its formula."""

import math

import pytest
import torch

from kernels.lattice import Lattice, exact_filter, pixel_features


def basis(d):
    """Rows: the image of each input axis in the hyperplane of the lattice, before scaling (Adams et al., section 3)."""
    rows = []
    for i in range(d):
        row = [1.0] * (i + 1) + [-(i + 1.0)] + [0.0] * (d - 1 - i)
        rows.append([v / math.sqrt((i + 1) * (i + 2)) for v in row])
    return rows


def enclosing_simplex(point):
    """(vertex, weight) of the d+1 corners around a point of the hyperplane."""
    d = len(point) - 1
    base = [round(p / (d + 1)) * (d + 1) for p in point]
    excess = sum(base) // (d + 1)
    order = sorted(range(d + 1), key=lambda i: point[i] - base[i], reverse=True)
    for i in order[::-1][:excess] if excess > 0 else order[:-excess]:
        base[i] += -(d + 1) if excess > 0 else d + 1
    offset = [(p - b) / (d + 1) for p, b in zip(point, base, strict=True)]
    order = sorted(range(d + 1), key=lambda i: -offset[i])
    ranked = [offset[i] for i in order]
    corners = []
    for k in range(d + 1):
        vertex = list(base)
        for position, i in enumerate(order):
            vertex[i] += k if position <= d - k else k - (d + 1)
        weight = ranked[d - k] - ranked[d - k + 1] if k else 1 - ranked[0] + ranked[d]
        corners.append((tuple(vertex), weight))
    return corners


def loop_filter(features, values, ring=False):
    """Splat, blur [1/2, 1, 1/2] along each axis in turn, slice; vertices in a dictionary, absent neighbours are 0."""
    n, d = features.shape
    axes = basis(d)
    scale = math.sqrt(2 / 3) * (d + 1) * (math.sqrt(7) / 2 if ring else 1)
    corners = []
    for f in features.tolist():
        point = [scale * sum(f[i] * axes[i][j] for i in range(d)) for j in range(d + 1)]
        corners.append(enclosing_simplex(point))
    table = {}
    for i in range(n):
        for vertex, weight in corners[i]:
            table[vertex] = table.get(vertex, 0) + weight * values[i]
    zero = torch.zeros_like(values[0])
    steps = [[d if i == axis else -1 for i in range(d + 1)] for axis in range(d + 1)]
    if ring:
        for vertex in list(table):
            for step in steps:
                for sign in (1, -1):
                    table.setdefault(tuple(a + sign * s for a, s in zip(vertex, step, strict=True)), zero)
    for step in steps + steps if ring else steps:
        table = {
            v: own
            + 0.5 * table.get(tuple(a + s for a, s in zip(v, step, strict=True)), zero)
            + 0.5 * table.get(tuple(a - s for a, s in zip(v, step, strict=True)), zero)
            for v, own in table.items()
        }
    return torch.stack([sum(w * table[v] for v, w in c) for c in corners]) / (1 + 2.0**-d)


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("spread", [0.3, 3.0, 40.0])
def test_equals_the_loop(d, spread, ring):
    features, values = spread * torch.randn(60, d, dtype=torch.float64), torch.randn(60, 3, dtype=torch.float64)
    want = loop_filter(features, values, ring)
    torch.testing.assert_close(Lattice(features, ring).filter(values), want, rtol=1e-10, atol=1e-12)


def test_the_ring_reduces_the_error():
    coarse = torch.rand(1, 3, 5, 6, dtype=torch.float64) * 200
    image = torch.nn.functional.interpolate(coarse, (48, 60), mode="bilinear")[0]
    features = pixel_features(image + 3 * torch.randn(3, 48, 60, dtype=torch.float64), 40.0, 8.0)
    values = (torch.rand(48 * 60, 3, dtype=torch.float64) < 0.1).double()
    norm = (exact_filter(features, torch.ones_like(values[:, :1])) + 1e-20).rsqrt()
    want = norm * exact_filter(features, norm * values)
    plain, ring = (Lattice(features, r).normalised(1.0).filter(values) - want for r in (False, True))
    assert ring.norm() < 0.7 * plain.norm() and ring.abs().max() < 0.8 * plain.abs().max()


def test_the_scale_of_the_ring_keeps_the_variance():
    # what one point spreads to points all around has the variance of the Gaussian, 1, on average over its place
    points = torch.arange(-6, 6, 0.02, dtype=torch.float64)[:, None]
    distance, values = points[:, 0] - points[300, 0], torch.zeros_like(points)
    values[300] = 1.0
    for ring in (False, True):
        answers = [Lattice(points + shift, ring).filter(values)[:, 0] for shift in torch.arange(0, 8, 0.1).tolist()]
        variances = [(a * distance.square()).sum() / a.sum() for a in answers]
        assert torch.stack(variances).mean().item() == pytest.approx(1.0, abs=0.01)


def test_fp32_stays_near_fp64():
    image = torch.rand(3, 20, 30, dtype=torch.float64) * 255
    features, values = pixel_features(image, 40.0, 10.0), torch.rand(600, 4, dtype=torch.float64)
    want = Lattice(features).filter(values)
    got = Lattice(features.float()).filter(values.float())
    assert (got - want).abs().max() < 1e-4 * want.abs().max()  # elevated coordinates near 500 in fp32 carry 3e-5


def test_barycentric_weights_are_a_partition():
    lattice = Lattice(20 * torch.randn(500, 5))
    weight = lattice.slice_weight * (1 + 2.0**-5)
    assert weight.min() > -1e-4  # coordinates up to 300 carry 3e-5 in fp32
    torch.testing.assert_close(weight.sum(1), torch.ones(500), rtol=0, atol=1e-4)


def test_share_of_the_true_sum():
    # The scale that the loss documents: the lattice gives a little over half of the Gaussian sums in five dimensions.
    coarse = torch.rand(1, 3, 6, 6) * 200
    image = torch.nn.functional.interpolate(coarse, (64, 64), mode="bilinear")[0] + 3 * torch.randn(3, 64, 64)
    features, ones = pixel_features(image, 50.0, 15.0), torch.ones(64 * 64, 1)
    share = (Lattice(features).filter(ones) / exact_filter(features, ones)).median()
    assert 0.45 < share < 0.7


def test_normalised_rows():
    features = pixel_features(torch.rand(3, 9, 9) * 255, 5.0, 60.0)
    raw = Lattice(features)
    norm = (raw.filter(torch.ones(81, 1)) + 1e-20).rsqrt()
    values = torch.rand(81, 2)
    want = 3.0 * norm * raw.filter(norm * values)
    torch.testing.assert_close(Lattice(features).normalised(3.0).filter(values), want, rtol=1e-5, atol=1e-6)


def test_exact_filter_in_chunks():
    features, values = torch.randn(50, 5, dtype=torch.float64), torch.randn(50, 2, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (features[:, None] - features[None]).square().sum(2))
    for chunk in (1, 170, 1 << 24):
        torch.testing.assert_close(exact_filter(features, values, chunk), kernel @ values, rtol=1e-12, atol=1e-14)


def test_too_small_a_deviation():
    with pytest.raises(ValueError, match="standard deviations are too small"):
        Lattice(torch.rand(10, 5) * 1e7)
