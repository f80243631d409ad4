// Pixel-adaptive refinement: shared parameters and the torch-free parts. The op is defined by kernels/par/reference.py.
//
// Letters: B batch, C channels, H W pixels, n taps. A tap is an offset (dy, dx); coordinates are clamped to the image.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace wsss {

constexpr int kMaxTaps = 256;  // 8 directions times at most 32 dilations
constexpr float kParColour = 0.3f;
constexpr float kParEps = 1e-8f;

struct ParTaps {
  int count;
  int32_t dy[kMaxTaps];
  int32_t dx[kMaxTaps];
  float place[kMaxTaps];  // position weight of the tap
};

// The taps of the dilations; offsets beyond the image are shortened, which clamping makes equivalent.
inline ParTaps make_taps(const int64_t* dilations, int num_dilations, const double* place, int64_t h, int64_t w) {
  constexpr int dirs[8][2] = {{-1, -1}, {-1, 0}, {-1, 1}, {0, -1}, {0, 1}, {1, -1}, {1, 0}, {1, 1}};
  ParTaps taps;
  taps.count = 8 * num_dilations;
  for (int i = 0; i < taps.count; ++i) {
    const int64_t d = dilations[i / 8];
    const int64_t ry = d < h - 1 ? d : h - 1, rx = d < w - 1 ? d : w - 1;
    taps.dy[i] = static_cast<int32_t>(dirs[i % 8][0] * ry);
    taps.dx[i] = static_cast<int32_t>(dirs[i % 8][1] * rx);
    taps.place[i] = static_cast<float>(place[i]);
  }
  return taps;
}

// CPU. Planes are padded: row r of plane p starts at p * plane + r * stride; pixel (y, x) lies at row y + reach_y,
// column x + reach_x. `columns` is the width rounded up to kParBlock: whole blocks are computed, the surplus ignored.
constexpr int64_t kParBlock = 16;
struct ParPadded {
  int64_t height, width, columns, reach_y, reach_x, stride, plane;
};
void par_fill_border(float* plane, const ParPadded& p);
// weights: [n, H, columns]; image: 3 padded planes.
void par_weight_row(const float* image, const ParTaps& taps, const ParPadded& p, int64_t y, float* weights);
void par_sweep_row(const float* from, float* to, const float* weights, const ParTaps& taps, const ParPadded& p,
                   int64_t channels, int64_t y);

// CUDA, on `stream`. image [B, 3, H, W], weights [B, n, H, W], maps [B, C, H, W].
void par_weights_cuda(const float* image, const ParTaps& taps, int64_t batch, int64_t h, int64_t w, float* weights,
                      DeviceStream stream);
void par_sweep_cuda(const float* from, float* to, const float* weights, const ParTaps& taps, int64_t batch,
                    int64_t channels, int64_t h, int64_t w, DeviceStream stream);

}  // namespace wsss
