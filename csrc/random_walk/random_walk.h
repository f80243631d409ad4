// Random walk on the affinities of an edge map: shared parameters and the torch-free parts. The op is defined by
// kernels/random_walk/reference.py.
//
// Letters: B batch, C channels, h w pixels, n offsets, g = (1 - edge)^beta. The weight of the pair (j, j + d) is the
// minimum of g on the path between them; one plane per offset holds it at j, 0 where a pair leaves the map.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace wsss {

constexpr int kWalkMaxRadius = 16;
constexpr int64_t kWalkMaxSteps = 1 << 16;
constexpr int kWalkMaxOffsets = 400;       // half of the cells nearer than 16: 398
constexpr float kWalkSmallest = 1.0e-30f;  // g below it is 0: no sum with the weight 1 of the pixel itself sees it

struct WalkOffsets {
  int count;
  int8_t dy[kWalkMaxOffsets];
  int8_t dx[kWalkMaxOffsets];
};

// Half of the offsets nearer than `radius`, without those that leave a map of h x w from everywhere.
inline WalkOffsets make_offsets(int radius, int64_t h, int64_t w) {
  WalkOffsets o{};
  for (int dy = 0; dy < radius && dy < h; ++dy) {
    for (int dx = 1 - radius; dx < radius; ++dx) {
      if (dy * dy + dx * dx >= radius * radius || (dy == 0 && dx <= 0) || dx >= w || -dx >= w) continue;
      o.dy[o.count] = static_cast<int8_t>(dy);
      o.dx[o.count++] = static_cast<int8_t>(dx);
    }
  }
  return o;
}

// Whether the cell (y, x) of the box spanned by (0, 0) and (dy, dx) lies on the path between them.
WSSS_HOST_DEVICE constexpr bool on_path(int dy, int dx, int y, int x) {
  return (dy * x - dx * y) * (dy * x - dx * y) < dy * dy + dx * dx;
}

// One application of the walk to a map u and its last difference v:
//   v_new = keep * v + gain * (P u - u);  u_new = u + v_new;  out += tail * (v + v_new) unless tail is 0.
// `out` is a double: where a seed stands alone, a sum that starts at the seed ends at a ten-thousandth of it.
struct WalkStep {
  float keep, gain;
  double tail;
};

// CPU. Maps lie in planes of rows of cells of kWalkCell floats. A cell holds `blocks` columns, `span` apart, of `maps`
// maps: lane m * blocks + r of cell X in row y is map m at the pixel (y, X + r * span). The neighbours of a pixel lie
// in its own lane, so every load is aligned. `halo` cells on both sides of a row repeat its other end, one column of
// the cell further; `above` rows lie before the map and as many behind it. What lies around the map is 0. What all maps
// share lies in cells of `blocks` floats.
constexpr int64_t kWalkCell = 16;
constexpr int64_t kWalkTile = 4;    // cells of a row that are computed at once
constexpr int64_t kWalkPlanes = 3;  // at most so many go through all applications together
struct WalkGrid {
  int64_t height, width, maps, blocks, span, halo, above;
  int64_t stride, plane;  // cells of a row, of a plane
  int64_t row(int64_t y) const { return (above + y) * stride + halo; }
};
// The neighbours of a pixel: rows -reach to reach; row dy has the columns -half[|dy|] to half[|dy|].
struct WalkDisc {
  int radius, reach, half[kWalkMaxRadius];
  int64_t count;  // of all, the pixel itself included

  int rows() const { return 2 * reach + 1; }
  // Row i of the order of summation: 0, 1, -1, 2, -2, ... What rows on both sides give almost cancels, so that no
  // partial sum grows, and neither does its rounding.
  static int row(int i) { return i % 2 == 1 ? (i + 1) / 2 : -(i / 2); }
};
struct WalkGraph {
  // Row by row, tile by tile: [count, cells of the tile, blocks] weights, in the order of the disc; that of the pixel
  // itself is 0.
  const float* weights;
  const float* inverse;  // plane: 1 / degree
  WalkDisc disc;
};
// Copies the ends of a row into its halo; `row` is its first cell, of `cell` floats.
void walk_fill_halo(const WalkGrid& p, int64_t cell, float* row);
// g of one row, from its edges; then the weights and degrees of a row. The path to neighbour n are the floats
// g[cells[first[n]]] to g[cells[first[n + 1] - 1]]; a neighbour without path has the weight 0.
void walk_gain_row(const WalkGrid& p, const float* edges, float beta, float* g);
void walk_weight_row(const WalkGrid& p, int64_t count, const int64_t* first, const int64_t* cells, const float* g,
                     float* weights, float* degree, float* inverse);
// One application to row y of 1 to kWalkPlanes planes.
void walk_step_row(const WalkGrid& p, const WalkGraph& graph, const WalkStep& step, int64_t planes, int64_t y,
                   const float* from, float* to, float* v, double* out);

// CUDA, on `stream`. edges [B, h, w], weights [B, n, h, w], degree [B, h, w], maps [B, C, h, w].
void walk_weights_cuda(const float* edges, const WalkOffsets& offsets, float beta, int64_t batch, int64_t h, int64_t w,
                       float* weights, float* degree, DeviceStream stream);
// maps *= degree, or maps /= degree.
void walk_scale_cuda(const float* degree, bool divide, int64_t batch, int64_t channels, int64_t h, int64_t w,
                     float* maps, DeviceStream stream);
void walk_step_cuda(const float* weights, const float* degree, const WalkOffsets& offsets, const WalkStep& step,
                    int64_t batch, int64_t channels, int64_t h, int64_t w, const float* from, float* to, float* v,
                    double* out, DeviceStream stream);

}  // namespace wsss
