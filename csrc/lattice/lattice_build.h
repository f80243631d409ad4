// Bodies that build the lattice of a batch; letters as in lattice_view.h.
#pragma once
#include <cstdint>

#include "lattice/lattice.h"
#include "lattice/lattice_simplex.h"
#include "lattice/lattice_view.h"

namespace wsss {

struct LatticeFrame {
  int64_t first;       // its first point
  int64_t pixel;       // first pixel of its first image
  const float* image;  // that image's three planes; null for two dimensions
  int64_t points, width;
};

// Where the features of the points come from.
template <int D>
struct LatticeSource {
  const LatticeFrame* frames;  // and one past the last, with the totals
  int64_t num_frames;
  int64_t stride, plane;  // floats in a row and in a plane of the images
  float sigma_xy, sigma_rgb;
  SimplexScale<D> scale;

  // `fits` turns false where a feature is out of range; such a feature counts as 0.
  WSSS_HOST_DEVICE Simplex<D> simplex(const LatticeFrame& frame, int64_t local, bool& fits) const {
    const auto pixel = static_cast<uint32_t>(local), width = static_cast<uint32_t>(frame.width);
    const uint32_t y = pixel / width, x = pixel % width;
    float feature[D];
    feature[0] = static_cast<float>(x) / sigma_xy;
    feature[1] = static_cast<float>(y) / sigma_xy;
    for (int c = 2; c < D; ++c) feature[c] = frame.image[(c - 2) * plane + y * stride + x] / sigma_rgb;
    for (int c = 0; c < D; ++c) {
      const bool inside = fabsf(feature[c]) <= kLatticeMaxFeature;
      fits = fits && inside;
      feature[c] = inside ? feature[c] : 0.f;
    }
    return enclosing_simplex<D>(feature, scale);
  }
};

// Per frame the maxima of -vertex [D], of vertex [D], and 1 if a feature is out of range.
template <int D>
constexpr int kLatticeRanges = 2 * D + 1;

template <int D>
struct LatticeRangeBody {
  LatticeSource<D> source;
  int32_t* parts;  // [F, kLatticeRanges, kReduceParts]
  WSSS_HOST_DEVICE void operator()(int64_t row, int64_t) const {
    const LatticeFrame& frame = source.frames[row / kReduceParts];
    int32_t most[2 * D];
    for (int i = 0; i < 2 * D; ++i) most[i] = INT32_MIN;
    bool fits = true;
    for (int64_t p = row % kReduceParts; p < frame.points; p += kReduceParts) {
      const Simplex<D> s = source.simplex(frame, p, fits);
      for (int i = 0; i < D; ++i) {
        most[i] = -s.vertex[i] > most[i] ? -s.vertex[i] : most[i];
        most[D + i] = s.vertex[i] > most[D + i] ? s.vertex[i] : most[D + i];
      }
    }
    int32_t* to = parts + row / kReduceParts * kLatticeRanges<D> * kReduceParts + row % kReduceParts;
    for (int i = 0; i < 2 * D; ++i) to[i * kReduceParts] = most[i];
    to[2 * D * kReduceParts] = !fits;
  }
};

// Mixed-radix keys: frame, then the coordinates with room for the corners of the simplices and their neighbours.
template <int D>
struct LatticeLayout {
  int64_t stride[D];
  int64_t step;  // sum of the strides
  int64_t size;  // keys of one frame
  int64_t fits;  // 0: a feature is out of range or the keys of the frames need more than 63 bits; the rest is 0 then
};

template <int D>
struct LatticeLayoutBody {
  const int32_t* ranges;  // [F, kLatticeRanges]
  int64_t num_frames;
  LatticeLayout<D>* layout;
  WSSS_HOST_DEVICE void operator()(int64_t, int64_t) const {
    LatticeLayout<D> l{};
    int64_t extent[D] = {};
    l.fits = 1;
    for (int64_t f = 0; f < num_frames; ++f) {
      const int32_t* range = ranges + f * kLatticeRanges<D>;
      for (int i = 0; i < D; ++i) {
        const int64_t own = int64_t{range[i]} + range[D + i] + 4 * (D + 1) + 1;
        extent[i] = own > extent[i] ? own : extent[i];
      }
      if (range[2 * D] != 0) l.fits = 0;
    }
    l.size = 1;
    for (int i = 0; i < D; ++i) {
      if (l.size > INT64_MAX / extent[i]) l.fits = 0;
      if (l.fits == 0) break;
      l.stride[i] = l.size;
      l.step += l.size;
      l.size *= extent[i];
    }
    if (num_frames > INT64_MAX / l.size) l.fits = 0;
    *layout = l.fits != 0 ? l : LatticeLayout<D>{};
  }
};

template <int D>
struct LatticeKeyBody {
  static constexpr int C = D + 1;
  LatticeSource<D> source;
  const int32_t* ranges;
  const LatticeLayout<D>* layout;
  uint64_t* keys;  // [P, C]
  int32_t* order;  // [P, C] own place
  float* weight;   // [P, C]
  WSSS_HOST_DEVICE void operator()(int64_t point, int64_t) const {
    const int64_t f = find_last<&LatticeFrame::first>(source.frames, source.num_frames, point);
    const LatticeFrame& frame = source.frames[f];
    const LatticeLayout<D> l = *layout;
    bool fits = true;
    const Simplex<D> s = source.simplex(frame, point - frame.first, fits);
    int64_t code = f * l.size;
    for (int i = 0; i < D; ++i) code += (s.vertex[i] + ranges[f * kLatticeRanges<D> + i] + 2 * C) * l.stride[i];
    for (int k = 0; k < C; ++k) {
      if (k > 0) {
        code += l.step;
        for (int i = 0; i < D; ++i) code -= s.rank[i] == C - k ? C * l.stride[i] : 0;
      }
      const int64_t at = point * C + k;
      keys[at] = static_cast<uint64_t>(code);
      order[at] = static_cast<int32_t>(at);
      weight[at] = s.weight[k];
    }
  }
};

// head [E] = 1 at the first of equal keys.
struct LatticeHeadBody {
  const uint64_t* keys;
  int32_t* head;
  WSSS_HOST_DEVICE void operator()(int64_t e, int64_t) const { head[e] = e == 0 || keys[e] != keys[e - 1]; }
};

struct LatticeTotals {
  int64_t fits;
  int64_t vertices, owners;  // of the frames
  int64_t rows, chunks;      // of the images
};

// Chunks of a frame, and those of the frames before it.
WSSS_HOST_DEVICE inline int64_t lattice_chunks(int64_t vertices, int64_t entries, int64_t frames) {
  return vertices + entries / kLatticeChunk + frames;
}

// `number` [E]: vertex of each sorted entry, from 1. Completes the images.
template <int D>
struct LatticeTotalsBody {
  static constexpr int C = D + 1;
  const LatticeFrame* frames;
  int64_t num_frames;
  const int32_t* number;
  const LatticeLayout<D>* layout;
  LatticeImage* images;
  int64_t num_images;
  LatticeTotals* totals;
  WSSS_HOST_DEVICE void operator()(int64_t, int64_t) const {
    int64_t rows = 0, chunks = 0;
    for (int64_t b = 0; b < num_images; ++b) {
      LatticeImage& image = images[b];
      const LatticeFrame& frame = frames[image.frame];
      image.vertex = number[C * frame.first] - 1;
      image.row = rows;
      image.chunk = chunks;
      image.owner = lattice_chunks(image.vertex, C * frame.first, image.frame);
      const int64_t vertices = number[C * (frame.first + frame.points) - 1] - image.vertex;
      rows += vertices;
      chunks += lattice_chunks(vertices, C * frame.points, 1);
    }
    const int64_t entries = C * frames[num_frames].first, vertices = number[entries - 1];
    *totals = {layout->fits, vertices, lattice_chunks(vertices, entries, num_frames), rows, chunks};
  }
};

template <int D>
struct LatticeEntryBody {
  static constexpr int C = D + 1;
  const LatticeFrame* frames;
  int64_t num_frames, num_entries;
  const uint64_t* keys;  // sorted
  const int32_t *order, *number;
  const float* weight;
  int32_t* corner;
  LatticeSplat* entries;
  int32_t* start;
  uint64_t* vertices;  // [M] key of each
  WSSS_HOST_DEVICE void operator()(int64_t e, int64_t) const {
    const int64_t first = frames[find_last<&LatticeFrame::first>(frames, num_frames, e / C)].first;
    const int64_t from = order[e], vertex = number[e] - 1;
    corner[from] = static_cast<int32_t>(vertex + 1 - number[C * first]);
    entries[e] = {static_cast<int32_t>(from / C - first), weight[from]};
    if (e == 0 || number[e - 1] != number[e]) {
      start[vertex] = static_cast<int32_t>(e);
      vertices[vertex] = keys[e];
    }
    if (e == num_entries - 1) start[vertex + 1] = static_cast<int32_t>(num_entries);
  }
};

// owner [chunks of the frames], filled with -1 before.
template <int D>
struct LatticeOwnerBody {
  static constexpr int C = D + 1;
  const LatticeFrame* frames;
  int64_t num_frames;
  const int32_t *number, *start;
  int32_t* owner;
  WSSS_HOST_DEVICE void operator()(int64_t vertex, int64_t) const {
    const int64_t begin = start[vertex], size = start[vertex + 1] - begin;
    const int64_t f = find_last<&LatticeFrame::first>(frames, num_frames, begin / C);
    const int64_t first_entry = C * frames[f].first, first_vertex = number[first_entry] - 1;
    int32_t* to = owner + lattice_chunks(first_vertex, first_entry, f) + vertex - first_vertex +
                  (begin - first_entry) / kLatticeChunk;
    for (int64_t i = 0; i * kLatticeChunk < size; ++i) to[i] = static_cast<int32_t>(vertex - first_vertex);
  }
};

// One lane per axis. `behind` is filled with 0 before.
template <int D>
struct LatticeNeighbourBody {
  static constexpr int C = D + 1;
  const uint64_t* vertices;
  int64_t num_vertices;
  const LatticeLayout<D>* layout;
  int32_t *ahead, *behind;
  WSSS_HOST_DEVICE void operator()(int64_t vertex, int64_t axis) const {
    const int64_t stride = axis < D ? layout->stride[axis] : 0;
    const uint64_t wanted = vertices[vertex] + static_cast<uint64_t>(C * stride - layout->step);
    int64_t low = 0, high = num_vertices;  // the last key <= wanted, if any
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (vertices[middle] <= wanted ? low : high) = middle;
    }
    const bool found = vertices[low] == wanted;
    const auto distance = static_cast<int32_t>(low - vertex);
    ahead[axis * num_vertices + vertex] = found ? distance : 0;
    if (found) behind[axis * num_vertices + low] = -distance;
  }
};

// Multiplies the weights of corners and entries by `norm` of the point's pixel.
template <int D>
struct LatticeNormaliseBody {
  static constexpr int C = D + 1;
  const LatticeFrame* frames;
  int64_t num_frames;
  const float* norm;
  float* weight;
  LatticeSplat* entries;
  WSSS_HOST_DEVICE void operator()(int64_t e, int64_t) const {
    const LatticeFrame& frame = frames[find_last<&LatticeFrame::first>(frames, num_frames, e / C)];
    weight[e] *= norm[frame.pixel + e / C - frame.first];
    entries[e].weight *= norm[frame.pixel + entries[e].point];
  }
};

template <int D>
struct LatticeNormBody {
  LatticeTerm<float, D> sums;
  float* norm;
  WSSS_HOST_DEVICE void operator()(int64_t pixel, int64_t) const {
    float sum = 0.f;
    sums.template add<1>(pixel, 1, 0, &sum);
    norm[pixel] = 1.f / sqrtf(sum + 1e-20f);
  }
};

}  // namespace wsss
