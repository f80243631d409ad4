// The inner loops of par on the CPU: no torch header, one clone per instruction set, chosen at load time.
#include <cmath>
#include <cstring>

#include "par/par.h"
#include "simd.h"

namespace wsss {

static_assert(kParBlock == 2 * kLanes);

void par_fill_border(float* plane, const ParPadded& p) {
  for (int64_t y = p.reach_y; y < p.reach_y + p.height; ++y) {
    float* row = plane + y * p.stride;
    const int64_t right = p.reach_x + p.width;
    for (int64_t x = 0; x < p.reach_x; ++x) row[x] = row[p.reach_x];
    for (int64_t x = right; x < p.stride; ++x) row[x] = row[right - 1];
  }
  for (int64_t y = 0; y < p.reach_y; ++y) {
    std::memcpy(plane + y * p.stride, plane + p.reach_y * p.stride, sizeof(float) * p.stride);
    std::memcpy(plane + (p.reach_y + p.height + y) * p.stride, plane + (p.reach_y + p.height - 1) * p.stride,
                sizeof(float) * p.stride);
  }
}

WSSS_CLONES
void par_weight_row(const float* image, const ParTaps& taps, const ParPadded& p, int64_t y, float* weights) {
  const int64_t tap_plane = p.height * p.columns;
  const float count = static_cast<float>(taps.count);
  int64_t jump[kMaxTaps];
  for (int n = 0; n < taps.count; ++n) jump[n] = taps.dy[n] * p.stride + taps.dx[n];
  for (int64_t x = 0; x < p.columns; x += kLanes) {
    const float* centre = image + (y + p.reach_y) * p.stride + x + p.reach_x;
    float* out = weights + y * p.columns + x;
    Vec scale[3];
    for (int ch = 0; ch < 3; ++ch) {
      const float* at = centre + ch * p.plane;
      Vec sum = {}, square = {};
      for (int n = 0; n < taps.count; ++n) sum += load<Vec>(at + jump[n]);
      const Vec mean = sum / count;
      for (int n = 0; n < taps.count; ++n) {
        const Vec d = load<Vec>(at + jump[n]) - mean;
        square += d * d;
      }
      square /= count - 1.0f;
      for (int i = 0; i < kLanes; ++i) scale[ch][i] = 1.0f / ((std::sqrt(square[i]) + kParEps) * kParColour);
    }
    Vec best = Vec{} - INFINITY;
    for (int n = 0; n < taps.count; ++n) {
      Vec total = {};
      for (int ch = 0; ch < 3; ++ch) {
        const float* at = centre + ch * p.plane;
        const Vec d = (load<Vec>(at + jump[n]) - load<Vec>(at)) * scale[ch];
        total += d * d;
      }
      total = total / -3.0f;
      best = total > best ? total : best;
      store(out + n * tap_plane, total);
    }
    Vec sum = {};
    for (int n = 0; n < taps.count; ++n) {
      const Vec e = exp_not_positive(load<Vec>(out + n * tap_plane) - best);
      sum += e;
      store(out + n * tap_plane, e);
    }
    const Vec inverse = 1.0f / sum;
    for (int n = 0; n < taps.count; ++n) {
      const Vec w = load<Vec>(out + n * tap_plane) * inverse + taps.place[n];
      store(out + n * tap_plane, w);
    }
  }
}

WSSS_CLONES
void par_sweep_row(const float* from, float* to, const float* weights, const ParTaps& taps, const ParPadded& p,
                   int64_t channels, int64_t y) {
  const int64_t tap_plane = p.height * p.columns;
  int64_t jump[kMaxTaps];
  for (int n = 0; n < taps.count; ++n) jump[n] = taps.dy[n] * p.stride + taps.dx[n];
  for (int64_t x = 0; x < p.columns; x += kParBlock) {
    const float* w = weights + y * p.columns + x;
    const int64_t place = (y + p.reach_y) * p.stride + x + p.reach_x;
    int64_t c = 0;
    for (; c + 1 < channels; c += 2) {  // two channels share each load of a weight
      const float* a = from + c * p.plane + place;
      const float* b = a + p.plane;
      Vec a0 = {}, a1 = {}, b0 = {}, b1 = {};
      for (int n = 0; n < taps.count; ++n) {
        const Vec w0 = load<Vec>(w + n * tap_plane), w1 = load<Vec>(w + n * tap_plane + kLanes);
        a0 += w0 * load<Vec>(a + jump[n]);
        a1 += w1 * load<Vec>(a + jump[n] + kLanes);
        b0 += w0 * load<Vec>(b + jump[n]);
        b1 += w1 * load<Vec>(b + jump[n] + kLanes);
      }
      float* out = to + c * p.plane + place;
      store(out, a0);
      store(out + kLanes, a1);
      store(out + p.plane, b0);
      store(out + p.plane + kLanes, b1);
    }
    if (c < channels) {
      const float* a = from + c * p.plane + place;
      Vec a0 = {}, a1 = {};
      for (int n = 0; n < taps.count; ++n) {
        a0 += load<Vec>(w + n * tap_plane) * load<Vec>(a + jump[n]);
        a1 += load<Vec>(w + n * tap_plane + kLanes) * load<Vec>(a + jump[n] + kLanes);
      }
      store(to + c * p.plane + place, a0);
      store(to + c * p.plane + place + kLanes, a1);
    }
  }
}

}  // namespace wsss
