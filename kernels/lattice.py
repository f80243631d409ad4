"""Permutohedral lattice in plain torch: approximate Gaussian sums over n points in d dimensions.

Adams, Baek and Davis, "Fast high-dimensional filtering using the permutohedral lattice" (Eurographics 2010), with the
scales and the blur of Kraehenbuehl and Koltun's dense CRF, so that results match pydensecrf up to rounding.
`filter(values)[i]` approximates sum_j exp(-|f_i - f_j|^2 / 2) values[j], times about 0.5 to 0.6 (the lattice loses that
share of the mass in 5-D; measured 0.57 on photographs, which symmetric normalisation hides and a raw sum shows).

The blur passes values between neighbouring vertices; what goes to a vertex that no point uses is lost, and with it the
way round through that vertex. With `ring=True` all neighbours of the used vertices exist as well (ghosts: no point
splats to them or slices from them), which brings the sums closer to those of the whole, infinite lattice, and the cells
are smaller: splatting and slicing make 1/4 of the variance and a blur 3/4 (in units of the cells squared), so cells
smaller by sqrt(1/4 + 2 * 3/4) with two blurs make the same Gaussian, sampled more finely.

Letters: n points, d dimensions, K channels, M lattice vertices in use. Deterministic: sorted keys, ordered sums.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

RING_BLURS = 2
RING_SCALE = math.sqrt(1 / 4 + RING_BLURS * 3 / 4)
MAX_FEATURE = 1e5  # beyond it float32 cannot tell the cells apart
TOO_SMALL = "lattice: the features span too many cells; the standard deviations are too small for this image"


def _simplex(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """features [d, n] -> nearest remainder-0 vertex [d+1, n] int64, ranks [d+1, n] int64, barycentric [d+1, n]."""
    d, n = features.shape
    scale = [(d + 1) * math.sqrt(2 / 3) / math.sqrt((i + 1) * (i + 2)) for i in range(d)]
    scaled = features * features.new_tensor(scale)[:, None]
    elevated = features.new_empty(d + 1, n)
    tail = features.new_zeros(n)
    for j in range(d, 0, -1):
        elevated[j] = tail - j * scaled[j - 1]
        tail = tail + scaled[j - 1]
    elevated[0] = tail
    cell = elevated / (d + 1)
    up, down = cell.ceil() * (d + 1), cell.floor() * (d + 1)
    vertex = torch.where(up - elevated < elevated - down, up, down)
    excess = (vertex.sum(0) / (d + 1)).round().long()
    offset = elevated - vertex
    rank = torch.zeros(d + 1, n, dtype=torch.int64, device=features.device)
    for i in range(d):
        for j in range(i + 1, d + 1):
            lower = offset[i] < offset[j]
            rank[i] += lower
            rank[j] += ~lower
    rank += excess
    shift = (rank < 0).long() - (rank > d).long()
    rank += shift * (d + 1)
    vertex = vertex.long() + shift * (d + 1)
    ordered = torch.empty_like(elevated).scatter_(0, d - rank, (elevated - vertex) / (d + 1))
    barycentric = ordered.clone()
    barycentric[1:] -= ordered[:-1]
    barycentric[0] += 1 - ordered[d]
    return vertex, rank, barycentric


class Lattice:
    """The lattice around one set of points; build once, filter often.

    features [n, d] float32 or float64, already divided by the standard deviations, finite.
    ring     also the neighbours, one step along each of the d + 1 axes, of the vertices in use; smaller cells, two
             blurs.
    Raises ValueError when the features span too many cells for float32 or for 63-bit keys (a standard deviation far too
    small: a colour deviation below about 0.3 grey levels).
    """

    def __init__(self, features: Tensor, ring: bool = False):
        n, d = features.shape
        self.num_blurs = RING_BLURS if ring else 1
        if ring:
            features = features * RING_SCALE
        if features.abs().amax() > MAX_FEATURE:
            raise ValueError(TOO_SMALL)
        vertex, rank, barycentric = _simplex(features.t().contiguous())
        margin = (3 if ring else 2) * (d + 1)  # room for simplex corners, their neighbours, and the neighbours of those
        strides, step = self._strides(vertex[:d], margin)
        order_stride = torch.zeros_like(rank).scatter_(0, rank, strides[:, None].expand(-1, n).contiguous())
        codes = torch.empty(n, d + 1, dtype=torch.int64, device=features.device)
        low = vertex[:d].amin(1, keepdim=True) - margin
        codes[:, 0] = ((vertex[:d] - low) * strides[:d, None]).sum(0)
        for k in range(1, d + 1):
            codes[:, k] = codes[:, k - 1] + step - (d + 1) * order_stride[d - k + 1]
        self._index(codes.view(-1), barycentric.t().contiguous(), (d + 1) * strides - step, ring)
        self.num_points, self.num_axes = n, d + 1

    @staticmethod
    def _strides(vertex: Tensor, margin: int) -> tuple[Tensor, int]:
        """Mixed-radix strides [d+1] of the keys (0 for the implied last coordinate), and their sum; `margin`: room."""
        extent = (vertex.amax(1) - vertex.amin(1) + 2 * margin + 1).tolist()
        strides, size = [], 1
        for e in extent:
            strides.append(size)
            size *= e
        if size >= 2**63:
            raise ValueError(TOO_SMALL)
        return torch.tensor([*strides, 0], dtype=torch.int64, device=vertex.device), sum(strides)

    def _index(self, codes: Tensor, barycentric: Tensor, steps: Tensor, ring: bool) -> None:
        """Number the vertices by ascending code; lists for splat and slice; both neighbours along each axis."""
        num_corners = barycentric.shape[1]
        ordered, order = codes.sort(stable=True)
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        used = keys = ordered[first]
        if ring:
            keys = torch.cat([used, *(used + step for step in steps), *(used - step for step in steps)]).unique()
        self.num_vertices = len(keys)
        self.used = torch.searchsorted(keys, used)
        self.corner = torch.empty_like(codes).scatter_(0, order, self.used[first.cumsum(0) - 1]).view(-1, num_corners)
        self.slice_weight = barycentric / (1 + 2.0 ** -(num_corners - 1))
        self.bag_start = first.nonzero().squeeze(1)
        self.bag_point = order // num_corners
        self.splat_weight = barycentric.view(-1)[order]
        self.neighbours = [self._find(keys, keys + sign * steps[:, None]) for sign in (1, -1)]

    def _find(self, keys: Tensor, wanted: Tensor) -> Tensor:
        """Vertex of each wanted key [axes, M], or M, the row of zeros, where it is not in use."""
        place = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
        return torch.where(keys[place] == wanted, place, len(keys))

    def normalised(self, weight: float) -> Lattice:
        """Turn the filter into weight * n_i K_ij n_j with n = (K 1 + 1e-20)^-1/2, in place; returns itself."""
        ones = self.slice_weight.new_ones(self.num_points, 1)
        norm = (self.filter(ones).squeeze(1) + 1e-20).rsqrt()
        self.splat_weight = self.splat_weight * norm[self.bag_point]
        self.slice_weight = self.slice_weight * (weight * norm)[:, None]
        return self

    def filter(self, values: Tensor) -> Tensor:
        """values [n, K] -> [n, K]; same dtype as the features."""
        m = self.num_vertices
        table = values.new_zeros(m + 1, values.shape[1])  # last row stays zero: the absent neighbour
        table[self.used] = F.embedding_bag(
            self.bag_point, values, self.bag_start, mode="sum", per_sample_weights=self.splat_weight
        )
        for axis in self.num_blurs * [*range(self.num_axes)]:
            blurred = table[self.neighbours[0][axis]].add_(table[self.neighbours[1][axis]])
            table[:m].add_(blurred, alpha=0.5)
        return F.embedding_bag(self.corner, table, mode="sum", per_sample_weights=self.slice_weight)


def exact_filter(features: Tensor, values: Tensor, chunk_values: int = 1 << 24) -> Tensor:
    """sum_j exp(-|f_i - f_j|^2 / 2) values[j] without approximation, O(n^2) time, bounded memory.

    features [n, d] divided by the standard deviations, values [n, K]; returns [n, K].
    """
    out = torch.empty_like(values)
    rows = max(1, chunk_values // max(1, len(features)))
    for start in range(0, len(features), rows):
        part = slice(start, start + rows)
        distance = torch.cdist(features[part], features, compute_mode="donot_use_mm_for_euclid_dist")
        out[part] = distance.square_().mul_(-0.5).exp_() @ values
    return out


def pixel_features(image: Tensor, sigma_xy: float, sigma_rgb: float | None) -> Tensor:
    """image [3, H, W] -> [H*W, 5]: (x / sigma_xy, y / sigma_xy, r, g, b / sigma_rgb); [H*W, 2] if sigma_rgb is None."""
    h, w = image.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(h, device=image.device, dtype=image.dtype),
        torch.arange(w, device=image.device, dtype=image.dtype),
        indexing="ij",
    )
    place = torch.stack([x, y]).reshape(2, -1) / sigma_xy
    if sigma_rgb is None:
        return place.t()
    return torch.cat([place, image.reshape(3, -1) / sigma_rgb]).t()
