// The lattice of a batch on the device, and the bodies that filter with it. kernels/lattice.py is the definition.
//
// Letters: D dimensions, C = D + 1 corners, F frames, P points, E = P C entries, M vertices. A frame is one set of
// points with its own vertices; images of the same size share a frame of the spatial lattice. Pixels, rows of vertices
// and rows of chunks are numbered over the images. Values are rows of `width` elements V, float or Quad.
#pragma once
#include <cstdint>

#include "device.h"

namespace wsss {

// The entries of a vertex are summed in runs of so many, then the sums of the runs: both in order.
constexpr int64_t kLatticeChunk = 64;

struct LatticeImage {
  int64_t pixel;  // its first
  int64_t frame;
  int64_t point;  // first of the frame
  // Known once the vertices are counted:
  int64_t vertex;  // first of the frame
  int64_t row;     // its first
  int64_t chunk;   // first of its rows of chunks
  int64_t owner;   // first of the chunks of the frame
};

struct alignas(8) LatticeSplat {
  int32_t point;  // counted from the first of the frame
  float weight;
};

template <int D>
struct LatticeView {
  static constexpr int C = D + 1;
  const LatticeImage* images;  // and one past the last, with the totals
  int64_t num_images, num_vertices;
  const int32_t* corner;        // [P, C] vertex, counted from the first of the frame
  const float* weight;          // [P, C]
  const LatticeSplat* entries;  // [E] by vertex, then by point
  const int32_t* start;         // [M+1] first entry of each vertex
  const int32_t* owner;         // vertex of each chunk, counted from the first of the frame, or -1
  const int32_t *ahead, *behind;  // [C, M] distance to the next vertex along each axis, 0 where there is none

  // First chunk of a vertex: no two overlap, since a vertex adds 1 and n entries at least n / kLatticeChunk.
  WSSS_HOST_DEVICE int64_t first_chunk(const LatticeImage& image, int64_t vertex) const {
    return vertex - image.vertex + (start[vertex] - C * image.point) / kLatticeChunk;
  }
};

// chunks [rows of chunks, width] = sums of the pixels' rows.
template <class V, int D>
struct LatticeChunkBody {
  LatticeView<D> lattice;
  const V* rows;
  int64_t width;
  V* chunks;
  WSSS_HOST_DEVICE void operator()(int64_t chunk, int64_t lane) const {
    const auto& image = lattice.images[find_last<&LatticeImage::chunk>(lattice.images, lattice.num_images, chunk)];
    const int64_t own = chunk - image.chunk, local = lattice.owner[image.owner + own];
    if (local < 0) return;
    const int64_t vertex = image.vertex + local, end = lattice.start[vertex + 1];
    const int64_t first = lattice.start[vertex] + (own - lattice.first_chunk(image, vertex)) * kLatticeChunk;
    const int64_t last = first + kLatticeChunk < end ? first + kLatticeChunk : end;
    const V* from = rows + image.pixel * width + lane;
    V sum{};
    for (int64_t e = first; e < last; ++e) {
      const LatticeSplat entry = lattice.entries[e];
      sum = sum + from[entry.point * width] * entry.weight;
    }
    chunks[chunk * width + lane] = sum;
  }
};

// table [rows, width] = sums of the chunks.
template <class V, int D>
struct LatticeCombineBody {
  LatticeView<D> lattice;
  const V* chunks;
  int64_t width;
  V* table;
  WSSS_HOST_DEVICE void operator()(int64_t row, int64_t lane) const {
    const auto& image = lattice.images[find_last<&LatticeImage::row>(lattice.images, lattice.num_images, row)];
    const int64_t vertex = image.vertex + row - image.row;
    const int64_t size = lattice.start[vertex + 1] - lattice.start[vertex];
    const V* from = chunks + (image.chunk + lattice.first_chunk(image, vertex)) * width + lane;
    V sum = from[0];
    for (int64_t i = 1; i * kLatticeChunk < size; ++i) sum = sum + from[i * width];
    table[row * width + lane] = sum;
  }
};

template <class V, int D>
struct LatticeBlurBody {
  LatticeView<D> lattice;
  int64_t axis;
  const V* from;
  int64_t width;
  V* to;
  WSSS_HOST_DEVICE void operator()(int64_t row, int64_t lane) const {
    const auto& image = lattice.images[find_last<&LatticeImage::row>(lattice.images, lattice.num_images, row)];
    const int64_t at = axis * lattice.num_vertices + image.vertex + row - image.row;
    const int64_t ahead = lattice.ahead[at], behind = lattice.behind[at];
    const V* here = from + row * width + lane;
    const V next = ahead != 0 ? here[ahead * width] : V{};
    const V previous = behind != 0 ? here[behind * width] : V{};
    to[row * width + lane] = *here + (previous + next) * 0.5f;
  }
};

// What a pixel reads: the rows of its corners and their weights.
template <int D>
struct LatticeStencil {
  static constexpr int C = D + 1;
  int64_t row[C];
  float weight[C];

  WSSS_HOST_DEVICE LatticeStencil(const LatticeView<D>& lattice, int64_t pixel) {
    const auto& image = lattice.images[find_last<&LatticeImage::pixel>(lattice.images, lattice.num_images, pixel)];
    const int64_t point = image.point + pixel - image.pixel;
    for (int k = 0; k < C; ++k) {
      row[k] = image.row + lattice.corner[point * C + k];
      weight[k] = lattice.weight[point * C + k];
    }
  }
  template <class V>
  WSSS_HOST_DEVICE V slice(const V* table, int64_t width, int64_t lane) const {
    V sum = table[row[0] * width + lane] * weight[0];
    for (int k = 1; k < C; ++k) sum = sum + table[row[k] * width + lane] * weight[k];
    return sum;
  }
};

// The factor of `slice` that makes the blur's sum right.
template <int D>
constexpr float lattice_slice_factor = 1.0f / (1.0f + 1.0f / static_cast<float>(1 << D));

// The blurred table of one kernel of a sum; absent where `table` is null.
template <class V, int D>
struct LatticeTerm {
  LatticeView<D> lattice;
  const V* table = nullptr;
  float factor = 0.f;

  // row [N] += factor * lanes [lane, lane + N) of the pixel, of `width`.
  template <int N>
  WSSS_HOST_DEVICE void add(int64_t pixel, int64_t width, int64_t lane, V* row) const {
    if (table == nullptr) return;
    const LatticeStencil<D> stencil(lattice, pixel);
    for (int n = 0; n < N; ++n) row[n] = row[n] + stencil.slice(table, width, lane + n) * factor;
  }
};

}  // namespace wsss
