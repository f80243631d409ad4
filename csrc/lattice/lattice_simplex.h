// The enclosing simplex of one point, for the GPU: the arithmetic of lattice_simplex_cpu.cpp, operation by operation,
// so that ties fall on the same side.
#pragma once
#include <cmath>
#include <cstdint>

#include "device.h"

namespace wsss {

// Sum and product that round by themselves: the GPU compiler would fuse them.
WSSS_HOST_DEVICE inline float add_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
WSSS_HOST_DEVICE inline float mul_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

template <int D>
struct SimplexScale {
  float of[D];
};

template <int D>
SimplexScale<D> simplex_scale() {
  SimplexScale<D> scale;
  for (int i = 0; i < D; ++i) {
    scale.of[i] = static_cast<float>((D + 1) * std::sqrt(2.0 / 3.0) / std::sqrt((i + 1.0) * (i + 2.0)));
  }
  return scale;
}

template <int D>
struct Simplex {
  int32_t vertex[D];    // nearest remainder-0 vertex; the last coordinate is implied
  int32_t rank[D + 1];  // of each coordinate
  float weight[D + 1];  // barycentric, of the corners with remainder 0 to D
};

template <int D>
WSSS_HOST_DEVICE inline Simplex<D> enclosing_simplex(const float* feature, const SimplexScale<D>& scale) {
  constexpr int C = D + 1;
  constexpr auto corners = static_cast<float>(C);
  Simplex<D> s;
  float e[C], v[C], tail = 0.f, total = 0.f;
  for (int j = D; j > 0; --j) {
    const float scaled = mul_rn(feature[j - 1], scale.of[j - 1]);
    e[j] = add_rn(tail, -mul_rn(scaled, static_cast<float>(j)));
    tail = add_rn(tail, scaled);
  }
  e[0] = tail;
  for (int j = 0; j < C; ++j) {
    const float cell = e[j] / corners;
    const float up = mul_rn(ceilf(cell), corners), down = mul_rn(floorf(cell), corners);
    v[j] = add_rn(up, -e[j]) < add_rn(e[j], -down) ? up : down;
    total = add_rn(total, v[j]);
  }
  const auto excess = static_cast<int32_t>(total / corners);
  for (int i = 0; i < C; ++i) s.rank[i] = excess;
  for (int i = 0; i < D; ++i) {
    for (int j = i + 1; j < C; ++j) {
      const bool lower = add_rn(e[i], -v[i]) < add_rn(e[j], -v[j]);
      s.rank[i] += lower;
      s.rank[j] += !lower;
    }
  }
  float ordered[C] = {};
  for (int i = 0; i < C; ++i) {
    const int32_t shift = ((s.rank[i] < 0) - (s.rank[i] > D)) * C;
    s.rank[i] += shift;
    v[i] = add_rn(v[i], static_cast<float>(shift));
    const float x = add_rn(e[i], -v[i]) / corners;
    for (int p = 0; p < C; ++p) ordered[p] = s.rank[i] == D - p ? x : ordered[p];
  }
  for (int i = 0; i < D; ++i) s.vertex[i] = static_cast<int32_t>(v[i]);
  s.weight[0] = add_rn(ordered[0], add_rn(1.f, -ordered[D]));
  for (int p = 1; p < C; ++p) s.weight[p] = add_rn(ordered[p], -ordered[p - 1]);
  return s;
}

}  // namespace wsss
