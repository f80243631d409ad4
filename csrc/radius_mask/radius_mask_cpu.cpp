// Schema of wsss::radius_mask and its CPU implementation.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "radius_mask/radius_mask.h"
#include "radius_mask/radius_mask_check.h"
#include "sigmoid/sigmoid.h"

namespace wsss {
namespace {

constexpr int64_t kRowsAtOnce = 16;

// The disc of a row in the type that is computed in, with room to read whole vectors behind the end of the row.
template <class S, class T>
const T* padded(const S* row, const std::vector<Span>& spans, std::vector<T>& room) {
  for (const Span& span : spans) {
    for (int64_t i = span.begin; i < span.end; ++i) room[i] = static_cast<T>(row[i]);
  }
  return room.data();
}

void sigmoid_spans(const double* from, const std::vector<Span>& spans, double* to) {
  for (const Span& span : spans) {
    std::copy(from + span.begin, from + span.end, to + span.begin);
    sigmoid_in_place(to + span.begin, span.end - span.begin);
  }
}

void zero_spans(const std::vector<Span>& spans, double* to) {
  for (const Span& span : spans) std::fill(to + span.begin, to + span.end, 0.0);
}

void sigmoid_gradient_spans(const double* grad, const double* y, const std::vector<Span>& spans, double* to) {
  for (const Span& span : spans) {
    for (int64_t i = span.begin; i < span.end; ++i) to[i] = grad[i] * (1 - y[i]) * y[i];
  }
}

// Fills each row of `result` with 0 and, over the disc of its patch, with what `compute(inputs, spans, to)` writes.
template <int kInputs, class F>
void for_each_row(const at::Tensor (&inputs)[kInputs], const at::Tensor& result, int64_t h, int64_t w, const Disc& disc,
                  F compute) {
  const int64_t n = h * w, rows = result.size(0) * n;
  const auto half = half_widths(disc, h, w);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, result.scalar_type(), "radius_mask", [&] {
    using T = at::opmath_type<scalar_t>;
    scalar_t* out = result.mutable_data_ptr<scalar_t>();
    const scalar_t* data[kInputs];
    for (int k = 0; k < kInputs; ++k) data[k] = inputs[k].template const_data_ptr<scalar_t>();
    at::parallel_for(0, rows, kRowsAtOnce, [&](int64_t begin, int64_t end) {
      std::vector<Span> spans;
      std::vector<T> line(n + kSigmoidBlock), room[kInputs];
      for (auto& r : room) r.resize(n + kSigmoidBlock);
      for (int64_t row = begin; row < end; ++row) {
        spans.clear();
        for_each_span(row % n, h, w, half, [&](int64_t first, int64_t last) {
          if (!spans.empty() && spans.back().end == first) {
            spans.back().end = last;
          } else {
            spans.push_back({first, last});
          }
        });
        const T* from[kInputs];
        for (int k = 0; k < kInputs; ++k) {
          const scalar_t* source = data[k] + row * n;
          if constexpr (std::is_same_v<scalar_t, T>) {
            from[k] = (rows - row - 1) * n >= kSigmoidBlock ? source : padded(source, spans, room[k]);
          } else {
            from[k] = padded(source, spans, room[k]);
          }
        }
        compute(from, spans, line.data());
        std::copy(line.data(), line.data() + n, out + row * n);
        zero_spans(spans, line.data());
      }
    });
  });
}

at::Tensor radius_mask_cpu(const at::Tensor& logits, int64_t h, int64_t w, int64_t limit, bool chebyshev) {
  check_patch_masks(logits, h, w, "radius_mask", "logits");
  auto result = at::empty(logits.sizes(), logits.options());
  if (result.numel() == 0) return result;
  const at::Tensor inputs[] = {logits.contiguous()};
  for_each_row(inputs, result, h, w, {limit, chebyshev},
               [](auto& from, const std::vector<Span>& spans, auto* to) { sigmoid_spans(from[0], spans, to); });
  return result;
}

at::Tensor radius_mask_backward_cpu(const at::Tensor& grad, const at::Tensor& out, int64_t h, int64_t w, int64_t limit,
                                    bool chebyshev) {
  check_radius_mask_backward(grad, out, h, w);
  auto result = at::empty(out.sizes(), out.options());
  if (result.numel() == 0) return result;
  const at::Tensor inputs[] = {grad.contiguous(), out.contiguous()};
  for_each_row(inputs, result, h, w, {limit, chebyshev}, [](auto& from, const std::vector<Span>& spans, auto* to) {
    sigmoid_gradient_spans(from[0], from[1], spans, to);
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def("radius_mask(Tensor logits, int h, int w, int limit, bool chebyshev) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("radius_mask_backward(Tensor grad, Tensor out, int h, int w, int limit, bool chebyshev) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("radius_mask", &radius_mask_cpu);
  m.impl("radius_mask_backward", &radius_mask_backward_cpu);
}

}  // namespace wsss
