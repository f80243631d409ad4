// Loops of the Gaussian sums: no torch header, one clone per instruction set.
#include "gaussian/gaussian.h"
#include "simd.h"

namespace wsss {
namespace {

template <class V>
constexpr int lanes_of = sizeof(V) / sizeof(float);

// Calls run.template operator()<V, NV>(c): rows are done in blocks of NV vectors from channel c on.
template <class Run>
WSSS_INLINE void for_blocks(int64_t width, const Run& run) {
  if (width == 1) return run.template operator()<float, 1>(0);
  if (width == 4) return run.template operator()<HalfVec, 1>(0);
  int64_t c = 0;
  for (; width - c >= 3 * kLanes; c += 3 * kLanes) run.template operator()<Vec, 3>(c);
  switch ((width - c) / kLanes) {
    case 2: return run.template operator()<Vec, 2>(c);
    case 1: return run.template operator()<Vec, 1>(c);
  }
}

// The rows of `to` from i on, B of them. Taps outside the radius are zeros, so that B changes no bit.
template <class V, int NV, int B>
WSSS_INLINE void along(const float* from, const float* taps, int64_t radius, int64_t i, int64_t width, float* to) {
  V sum[B][NV] = {};
  const float* weight = taps + kGaussianBlock - 1;
  for (int64_t p = 0; p < 2 * radius + B; ++p) {
    const float* at = from + (i + p - radius) * width;
    for (int v = 0; v < NV; ++v) {
      const V x = load<V>(at + v * lanes_of<V>);
      for (int b = 0; b < B; ++b) sum[b][v] += x * weight[p - b];
    }
  }
  for (int b = 0; b < B; ++b) {
    for (int v = 0; v < NV; ++v) store<V>(to + (i + b) * width + v * lanes_of<V>, sum[b][v]);
  }
}

template <class V, int NV>
WSSS_INLINE void across(const float* from, int64_t stride, const float* weight, int64_t count, float* to) {
  V sum[NV] = {};
  for (int64_t t = 0; t < count; ++t) {
    for (int v = 0; v < NV; ++v) sum[v] += load<V>(from + t * stride + v * lanes_of<V>) * weight[t];
  }
  for (int v = 0; v < NV; ++v) store<V>(to + v * lanes_of<V>, sum[v]);
}

// Distance in the exponent between the box of a tile and what lies in [low, high], `at` on.
WSSS_INLINE Vec gap(const GaussianPoints& p, int64_t tile, const float* const* low, const float* const* high,
                    int64_t at) {
  Vec square[5];
  for (int k = 0; k < 5; ++k) {
    const Vec below = load<Vec>(low[k] + at) - p.high[k][tile], above = p.low[k][tile] - load<Vec>(high[k] + at);
    const Vec d = larger(larger(below, above), Vec{});
    square[k] = d * d;
  }
  return (square[0] + square[1]) * p.scale_xy + (square[2] + square[3] + square[4]) * p.scale_rgb;
}

// weight [count, kGaussianTile] = exp(-|f_i - f_j|^2 / 2), i the points of the tile, j those listed.
WSSS_INLINE void weights(const GaussianPoints& p, int64_t tile, const int32_t* listed, int64_t count, float* weight) {
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t i = 0; i < kGaussianTile; i += kLanes) {
      Vec square[5];
      for (int k = 0; k < 5; ++k) {
        const Vec d = load<Vec>(p.feature[k] + tile * kGaussianTile + i) - p.feature[k][listed[j]];
        square[k] = d * d;
      }
      const Vec place = (square[0] + square[1]) * p.scale_xy;
      const Vec colour = (square[2] + square[3] + square[4]) * p.scale_rgb;
      store(weight + j * kGaussianTile + i, exp_not_positive(-(place + colour)));
    }
  }
}

template <class V>
WSSS_INLINE void add_to(double* sums, const V& v) {
  typedef double Wide __attribute__((vector_size(2 * sizeof(V))));
  Wide sum;
  __builtin_memcpy(&sum, sums, sizeof(sum));
  sum += __builtin_convertvector(v, Wide);
  __builtin_memcpy(sums, &sum, sizeof(sum));
}

template <class V, int NV>
WSSS_INLINE void multiply(const float* weight, const int32_t* listed, int64_t count, const float* values, int64_t width,
                          double* sums) {
  constexpr int R = NV == 1 ? 8 : 4;  // as many independent sums as the registers hold
  for (int r = 0; r < kGaussianTile; r += R) {
    V sum[R][NV] = {};
    for (int64_t j = 0; j < count; ++j) {
      const float* from = values + listed[j] * width;
      V x[NV];
      for (int v = 0; v < NV; ++v) x[v] = load<V>(from + v * lanes_of<V>);
      for (int k = 0; k < R; ++k) {
        for (int v = 0; v < NV; ++v) sum[k][v] += x[v] * weight[j * kGaussianTile + r + k];
      }
    }
    for (int k = 0; k < R; ++k) {
      for (int v = 0; v < NV; ++v) add_to(sums + (r + k) * width + v * lanes_of<V>, sum[k][v]);
    }
  }
}

WSSS_INLINE void multiply_single(const float* weight, const int32_t* listed, int64_t count, const float* values,
                                 double* sums) {
  for (int r = 0; r < kGaussianTile; r += kLanes) {
    Vec sum = {};
    for (int64_t j = 0; j < count; ++j) sum += load<Vec>(weight + j * kGaussianTile + r) * values[listed[j]];
    add_to(sums + r, sum);
  }
}

}  // namespace

WSSS_CLONES
void gaussian_along(const float* from, const float* taps, int64_t radius, int64_t n, int64_t width, float* to) {
  for_blocks(width, [&]<class V, int NV>(int64_t c) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + kGaussianBlock <= n; i += kGaussianBlock) {
      along<V, NV, kGaussianBlock>(from + c, taps, radius, i, width, to + c);
    }
    for (; i < n; ++i) along<V, NV, 1>(from + c, taps, radius, i, width, to + c);
  });
}

WSSS_CLONES
void gaussian_across(const float* from, int64_t stride, const float* weight, int64_t count, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 8 * kLanes <= n; i += 8 * kLanes) across<Vec, 8>(from + i, stride, weight, count, to + i);
  for (; i + kLanes <= n; i += kLanes) across<Vec, 1>(from + i, stride, weight, count, to + i);
  for (; i < n; ++i) across<float, 1>(from + i, stride, weight, count, to + i);
}

WSSS_CLONES
void gaussian_tile(const GaussianPoints& p, int64_t tile, const float* values, int64_t width, double* sums) {
  constexpr int kPanel = 64;  // points whose products are summed in fp32
  float weight[(kPanel + kGaussianTile) * kGaussianTile];
  int32_t listed[kPanel + kGaussianTile];
  int64_t count = 0;
  const auto flush = [&]() __attribute__((always_inline)) {
    weights(p, tile, listed, count, weight);
    if (width == 1) {
      multiply_single(weight, listed, count, values, sums);
    } else {
      for_blocks(width, [&]<class V, int NV>(int64_t c) __attribute__((always_inline)) {
        if constexpr (lanes_of<V> > 1) multiply<V, NV>(weight, listed, count, values + c, width, sums + c);
      });
    }
    count = 0;
  };
  for (int64_t i = 0; i < kGaussianTile * width; ++i) sums[i] = 0.0;
  for (int64_t others = 0; others < p.num_tiles; others += kLanes) {
    const IntVec near_tiles = gap(p, tile, p.low, p.high, others) <= kGaussianCut;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      if (near_tiles[lane] == 0 || others + lane >= p.num_tiles) continue;
      const int64_t first = (others + lane) * kGaussianTile;
      for (int64_t i = first; i < first + kGaussianTile; i += kLanes) {
        const IntVec near = gap(p, tile, p.feature, p.feature, i) <= kGaussianCut;
        for (int k = 0; k < kLanes; ++k) {
          listed[count] = static_cast<int32_t>(i + k);
          count += near[k] != 0 && i + k < p.num_points;
        }
      }
      if (count >= kPanel) flush();
    }
  }
  if (count > 0) flush();
}

}  // namespace wsss
