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

// CPU. Row r of a padded plane starts at r * stride, pixel (y, x) lies at `origin` + y * stride + x; everything around
// the map is 0. `columns` is the width rounded up to kWalkLanes: whole vectors are computed, the surplus stays 0.
constexpr int64_t kWalkLanes = 16;
struct WalkGrid {
  int64_t height, width, columns, stride, origin, plane;
};
struct WalkGraph {
  const float* weights;  // [n] padded planes
  const float* inverse;  // padded plane: 1 / degree
  int count;
  int64_t jump[kWalkMaxOffsets];  // distance in memory of the offset
};
// g of one row, from its edges; then the weights of one row of one offset; then the degrees of a row.
void walk_gain_row(const float* edges, float beta, int64_t width, float* g);
void walk_weight_row(const float* g, const int64_t* cells, int num_cells, int64_t columns, float* weights);
void walk_degree_row(const WalkGraph& graph, const WalkGrid& p, int64_t y, float* degree, float* inverse);
// 1 to kWalkChannels maps, a padded plane each.
constexpr int64_t kWalkChannels = 4;
void walk_step_row(const WalkGraph& graph, const WalkGrid& p, const WalkStep& step, int64_t channels, int64_t y,
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
