// The sigmoid of the region ops on the CPU: no torch header.
#include <cmath>

#include "lanes.h"
#include "radius_mask/radius_mask.h"
#include "simd.h"

namespace wsss {
namespace {

using Loose = Lanes<float>::Loose;

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

}  // namespace

WSSS_CLONES
void sigmoid_in_place(float* x, int64_t n) {
  static_assert(kSigmoidBlock == Lanes<float>::count);
  for (int64_t i = 0; i < n; i += kSigmoidBlock) {
    Vec v = *reinterpret_cast<const Loose*>(x + i);
    sigmoid_lanes(v);
    *reinterpret_cast<Loose*>(x + i) = v;
  }
}

WSSS_CLONES
void sigmoid_spans(const float* from, const std::vector<Span>& spans, float* to) {
  for (const Span& span : spans) {
    for (int64_t i = span.begin; i < span.end; i += kSigmoidBlock) {
      Vec v = *reinterpret_cast<const Loose*>(from + i);
      sigmoid_lanes(v);
      *reinterpret_cast<Loose*>(to + i) = v;
    }
    *reinterpret_cast<Loose*>(to + span.end) = Vec{};
  }
}

WSSS_CLONES
void zero_spans(const std::vector<Span>& spans, float* to) {
  for (const Span& span : spans) {
    for (int64_t i = span.begin; i < span.end; i += kSigmoidBlock) *reinterpret_cast<Loose*>(to + i) = Vec{};
  }
}

WSSS_CLONES
void sigmoid_gradient_spans(const float* grad, const float* y, const std::vector<Span>& spans, float* to) {
  for (const Span& span : spans) {
    for (int64_t i = span.begin; i < span.end; i += kSigmoidBlock) {
      const Vec p = *reinterpret_cast<const Loose*>(y + i);
      *reinterpret_cast<Loose*>(to + i) = *reinterpret_cast<const Loose*>(grad + i) * (1.0f - p) * p;
    }
    *reinterpret_cast<Loose*>(to + span.end) = Vec{};
  }
}

void sigmoid_in_place(double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = 1.0 / (1.0 + std::exp(-x[i]));
}

}  // namespace wsss
