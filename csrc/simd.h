// Eight floats at once by the vector extension of GCC and Clang.
#pragma once
#include <cstdint>

#include "clones.h"

namespace wsss {

constexpr int kLanes = 8;
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float HalfVec __attribute__((vector_size(2 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));

template <class V>
WSSS_INLINE V load(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
WSSS_INLINE void store(float* p, const V& v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

WSSS_INLINE Vec larger(const Vec& a, const Vec& b) { return a > b ? a : b; }

WSSS_INLINE float sum_of_lanes(const Vec& v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// exp(x) = p 2^k with k an integer, for |x| <= 89: p lies around 1, relative error below 2e-7.
struct ExpParts {
  Vec p;
  IntVec k;
};

WSSS_INLINE ExpParts exp_parts(const Vec& x) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec k = (x * 1.44269504f + magic) - magic;
  const Vec r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {p * r * r + r + 1.0f, __builtin_convertvector(k, IntVec)};
}

// 2^(k - kLess) for -126 <= k - kLess <= 127, and 0 for -127. Of a NaN, k may be INT_MIN.
template <int kLess = 0>
WSSS_INLINE Vec power_of_two(const IntVec& k) {
  const IntVec bits = (k + (127 - kLess)) << 23;
  return (Vec)bits;  // a cast between vector types keeps the bits
}

// exp(x) for x <= 0, relative error below 2e-7; 0 for x < -69 (1e-30), so that no product with it is denormal.
WSSS_INLINE Vec exp_not_positive(const Vec& x) {
  const Vec lowest = Vec{} - 69.0f;
  const ExpParts e = exp_parts(larger(x, lowest));
  return x < lowest ? Vec{} : e.p * power_of_two(e.k);
}

// ln(x) for normal x > 0; error below 1e-7 of the larger of 1 and |ln(x)|.
WSSS_INLINE Vec log_of_normal(const Vec& x) {
  const IntVec bits = (IntVec)x, exponent = (bits - 0x3f3504f3) >> 23;  // of x = m 2^e, sqrt(1/2) <= m < sqrt(2)
  const Vec e = __builtin_convertvector(exponent, Vec), r = (Vec)(bits - (exponent << 23)) - 1.0f, r2 = r * r;
  Vec p = r * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  return (p * r * r2 - e * 2.12194440e-4f - r2 * 0.5f + r) + e * 0.693359375f;
}

// x becomes 1 / (1 + exp(-x)), relative error below 4e-7.
WSSS_INLINE void sigmoid_lanes(Vec& x) {
  // t = exp(-x) in two factors, so that it overflows to infinity only where exp does; a NaN stays one.
  Vec t = -x;
  const Vec lowest = Vec{} - 87.0f, highest = Vec{} + 88.8f;
  t = t < lowest ? lowest : t;
  t = t > highest ? highest : t;
  const ExpParts e = exp_parts(t);
  t = (e.p + e.p) * power_of_two<1>(e.k);
  x = 1.0f / (1.0f + t);
}

}  // namespace wsss
