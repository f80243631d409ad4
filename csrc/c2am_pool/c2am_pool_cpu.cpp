// Schema of wsss::c2am_pool and its CPU implementation.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "c2am_pool/c2am_pool_check.h"
#include "sigmoid/sigmoid.h"
#include "widened.h"

namespace wsss {
namespace {

constexpr int64_t kRowsAtOnce = 256;

// q = sigmoid(logits) of one image, and 1 - q.
template <class T>
struct Weights {
  Weights(const T* logits, int64_t n) : q(n + kSigmoidBlock), rest(n) {
    std::copy(logits, logits + n, q.begin());
    sigmoid_in_place(q.data(), n);
    std::transform(q.begin(), q.begin() + n, rest.begin(), [](T x) { return 1 - x; });
  }
  std::vector<T> q, rest;
};

template <class T>
std::vector<Weights<T>> weights_of(const at::Tensor& logits) {
  std::vector<Weights<T>> all;
  for (int64_t b = 0; b < logits.size(0); ++b) {
    all.emplace_back(logits.const_data_ptr<T>() + b * logits.size(1), logits.size(1));
  }
  return all;
}

// c2am_pool_backward_rows for rows of any type.
template <class S, class T>
struct BackwardGroup {
  void operator()(const S* rows, int64_t count, const T* base, const T* slope, const T* q, int64_t n, T* flow,
                  S* grad) {
    if constexpr (std::is_same_v<S, T>) {
      c2am_pool_backward_rows(rows, count, base, slope, q, n, flow, grad);
    } else {
      result.resize(count * n);
      c2am_pool_backward_rows(widened(rows, count * n, room), count, base, slope, q, n, flow, result.data());
      std::transform(result.begin(), result.end(), grad, [](T x) { return static_cast<S>(x); });
    }
  }
  std::vector<T> room, result;
};

// Calls f(image, first channel, number of channels) for at most kPoolRows channels at once, at the same places whatever
// the threads.
template <class F>
void for_each_group(int64_t begin, int64_t end, int64_t channels, F f) {
  const int64_t groups = (channels + kPoolRows - 1) / kPoolRows;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item % groups * kPoolRows;
    f(item / groups, first, std::min(kPoolRows, channels - first));
  }
}

std::tuple<at::Tensor, at::Tensor> c2am_pool_cpu(const at::Tensor& features, const at::Tensor& logits) {
  check_c2am_pool(features, logits, "c2am_pool");
  const int64_t batch = features.size(0), d = features.size(1), n = features.size(2);
  auto foreground = at::empty({batch, d}, logits.options()), background = at::empty({batch, d}, logits.options());
  if (foreground.numel() == 0) return {foreground, background};
  const auto values = features.contiguous(), scores = logits.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, features.scalar_type(), "c2am_pool", [&] {
    using T = at::opmath_type<scalar_t>;
    const auto weights = weights_of<T>(scores);
    const scalar_t* from = values.const_data_ptr<scalar_t>();
    T *inside = foreground.mutable_data_ptr<T>(), *outside = background.mutable_data_ptr<T>();
    const T share = T(1) / static_cast<T>(n);
    const int64_t groups = (d + kPoolRows - 1) / kPoolRows;
    at::parallel_for(0, batch * groups, kRowsAtOnce / kPoolRows, [&](int64_t begin, int64_t end) {
      std::vector<T> room;
      for_each_group(begin, end, d, [&](int64_t b, int64_t first, int64_t count) {
        const int64_t place = b * d + first;
        const T* rows = widened(from + place * n, count * n, room);
        c2am_pool_rows(rows, count, weights[b].q.data(), weights[b].rest.data(), n, inside + place, outside + place);
        for (int64_t i = place; i < place + count; ++i) {
          inside[i] *= share;
          outside[i] *= share;
        }
      });
    });
  });
  return {foreground, background};
}

std::tuple<at::Tensor, at::Tensor> c2am_pool_backward_cpu(const at::Tensor& grad_foreground,
                                                          const at::Tensor& grad_background,
                                                          const at::Tensor& features, const at::Tensor& logits) {
  check_c2am_pool_backward(grad_foreground, grad_background, features, logits);
  const int64_t batch = features.size(0), d = features.size(1), n = features.size(2);
  auto grad_features = at::empty(features.sizes(), features.options());
  auto grad_logits = at::empty(logits.sizes(), logits.options());
  if (batch == 0) return {grad_features, grad_logits};
  const auto values = features.contiguous(), scores = logits.contiguous();
  const auto inside = grad_foreground.contiguous(), outside = grad_background.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, features.scalar_type(), "c2am_pool_backward", [&] {
    using T = at::opmath_type<scalar_t>;
    const auto weights = weights_of<T>(scores);
    const scalar_t* from = values.const_data_ptr<scalar_t>();
    const T *to_foreground = inside.const_data_ptr<T>(), *to_background = outside.const_data_ptr<T>();
    scalar_t* to = grad_features.mutable_data_ptr<scalar_t>();
    const int64_t chunks = (d + kPoolChunk - 1) / kPoolChunk;
    auto parts = at::empty({batch, chunks, n}, logits.options());
    T* flows = parts.mutable_data_ptr<T>();
    at::parallel_for(0, batch * chunks, 1, [&](int64_t begin, int64_t end) {
      BackwardGroup<scalar_t, T> group;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / chunks, stop = std::min((item % chunks + 1) * kPoolChunk, d);
        T* flow = flows + item * n;
        std::fill(flow, flow + n, T(0));
        for (int64_t c = item % chunks * kPoolChunk; c < stop; c += kPoolRows) {
          const int64_t count = std::min(kPoolRows, stop - c), place = b * d + c;
          T base[kPoolRows], slope[kPoolRows];
          for (int64_t r = 0; r < count; ++r) {
            base[r] = to_background[place + r] / static_cast<T>(n);
            slope[r] = (to_foreground[place + r] - to_background[place + r]) / static_cast<T>(n);
          }
          group(from + place * n, count, base, slope, weights[b].q.data(), n, flow, to + place * n);
        }
      }
    });
    T* flow = grad_logits.mutable_data_ptr<T>();
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = 0; i < n; ++i) {
        double sum = 0;
        for (int64_t c = 0; c < chunks; ++c) sum += flows[(b * chunks + c) * n + i];
        flow[b * n + i] = static_cast<T>(sum * weights[b].q[i] * weights[b].rest[i]);
      }
    }
  });
  return {grad_features, grad_logits};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def("c2am_pool(Tensor features, Tensor logits) -> (Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
  m.def(
      "c2am_pool_backward(Tensor grad_foreground, Tensor grad_background, Tensor features, Tensor logits) -> "
      "(Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("c2am_pool", &c2am_pool_cpu);
  m.impl("c2am_pool_backward", &c2am_pool_backward_cpu);
}

}  // namespace wsss
