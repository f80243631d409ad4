// The inner loops of par on the CPU: no torch header, one clone per instruction set, chosen at load time.
#include <cmath>
#include <cstring>

#include "par/par.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define WSSS_CLONES __attribute__((target_clones("avx512f", "avx2,fma", "default")))
#else
#define WSSS_CLONES
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a call: the helpers below are always inlined
#endif
#define WSSS_INLINE inline __attribute__((always_inline))

namespace wsss {
namespace {

constexpr int kLanes = 16;
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float LooseVec __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));

#define LOAD(p) (*reinterpret_cast<const LooseVec*>(p))
#define STORE(p, v) (*reinterpret_cast<LooseVec*>(p) = (v))

// exp(x) for x <= 0, relative error below 2e-7; below -87 it is exp(-87), 1.6e-38.
WSSS_INLINE void exp_in_place(Vec& x) {
  const Vec lowest = Vec{} - 87.0f;
  x = x < lowest ? lowest : x;
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec k = (x * 1.44269504f + magic) - magic;
  const Vec r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const IntVec bits = (__builtin_convertvector(k, IntVec) + 127) << 23;
  x = p * (Vec)bits;  // a cast between vector types keeps the bits
}

}  // namespace

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
      for (int n = 0; n < taps.count; ++n) sum += LOAD(at + jump[n]);
      const Vec mean = sum / count;
      for (int n = 0; n < taps.count; ++n) {
        const Vec d = LOAD(at + jump[n]) - mean;
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
        const Vec d = (LOAD(at + jump[n]) - LOAD(at)) * scale[ch];
        total += d * d;
      }
      total = total / -3.0f;
      best = total > best ? total : best;
      STORE(out + n * tap_plane, total);
    }
    Vec sum = {};
    for (int n = 0; n < taps.count; ++n) {
      Vec e = LOAD(out + n * tap_plane) - best;
      exp_in_place(e);
      sum += e;
      STORE(out + n * tap_plane, e);
    }
    const Vec inverse = 1.0f / sum;
    for (int n = 0; n < taps.count; ++n) STORE(out + n * tap_plane, LOAD(out + n * tap_plane) * inverse + taps.place[n]);
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
        const Vec w0 = LOAD(w + n * tap_plane), w1 = LOAD(w + n * tap_plane + kLanes);
        a0 += w0 * LOAD(a + jump[n]);
        a1 += w1 * LOAD(a + jump[n] + kLanes);
        b0 += w0 * LOAD(b + jump[n]);
        b1 += w1 * LOAD(b + jump[n] + kLanes);
      }
      float* out = to + c * p.plane + place;
      STORE(out, a0);
      STORE(out + kLanes, a1);
      STORE(out + p.plane, b0);
      STORE(out + p.plane + kLanes, b1);
    }
    if (c < channels) {
      const float* a = from + c * p.plane + place;
      Vec a0 = {}, a1 = {};
      for (int n = 0; n < taps.count; ++n) {
        a0 += LOAD(w + n * tap_plane) * LOAD(a + jump[n]);
        a1 += LOAD(w + n * tap_plane + kLanes) * LOAD(a + jump[n] + kLanes);
      }
      STORE(to + c * p.plane + place, a0);
      STORE(to + c * p.plane + place + kLanes, a1);
    }
  }
}

}  // namespace wsss
