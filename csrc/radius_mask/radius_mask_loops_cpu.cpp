// The sigmoid within a disc on the CPU: no torch header.
#include "lanes.h"
#include "radius_mask/radius_mask.h"
#include "sigmoid/sigmoid.h"
#include "simd.h"

namespace wsss {
namespace {

using Loose = Lanes<float>::Loose;

}  // namespace

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

}  // namespace wsss
