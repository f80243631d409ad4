// Schema of wsss::max_upsampled_masks and its CPU implementation.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <tuple>
#include <vector>

#include "check.h"
#include "max_upsampled_masks/max_upsampled_masks_check.h"
#include "sigmoid/sigmoid.h"

namespace wsss {
namespace {

constexpr int64_t kMembersAtOnce = 64;  // bounds the memory of the upsampled rows

// All that the pairs share.
template <class T>
struct Resize {
  Resize(int64_t grid_h, int64_t grid_w, int64_t out_h, int64_t out_w, const Disc& disc)
      : h(grid_h), w(grid_w), height(out_h), width(out_w), half(half_widths(disc, grid_h, grid_w)),
        rows(taps_of<T>(grid_h, out_h)), columns(taps_of<T>(grid_w, out_w)), bands(runs_of(rows)), runs(runs_of(columns)),
        low(out_w + kUpsampleLanes), high(out_w + kUpsampleLanes), first(grid_w, out_w), last(grid_w, 0) {
    for (int64_t x = 0; x < width; ++x) {
      low[x] = columns[x].low_weight;
      high[x] = columns[x].high_weight;
    }
    for (const TapRun& run : runs) {
      for (int64_t cell = 0; cell <= run.high; ++cell) first[cell] = std::min(first[cell], run.begin);
      for (int64_t cell = run.low; cell < w; ++cell) last[cell] = std::max(last[cell], run.end);
    }
  }

  bool row_in_disc(int64_t patch, int64_t y) const {
    return std::abs(patch / w - y) < static_cast<int64_t>(half.size());
  }

  const int64_t h, w, height, width;
  const std::vector<int64_t> half;
  const std::vector<Tap<T>> rows, columns;
  const std::vector<TapRun> bands, runs;
  std::vector<T> low, high;          // weights of each pixel column
  std::vector<int64_t> first, last;  // pixel columns [first[a], last[b]) touch the cells a .. b
};

// sigmoid(logits) of one patch inside its disc, side by side in `inside`.
template <class T, class S>
void disc_sigmoid(const S* logits, int64_t patch, const Resize<T>& r, std::vector<T>& inside) {
  int64_t count = 0;
  for_each_span(patch, r.h, r.w, r.half, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) inside[count++] = static_cast<T>(logits[i]);
  });
  sigmoid_in_place(inside.data(), count);
}

template <class T, class S>
void fill_masks(const S* logits, const int64_t* patches, int64_t count, const Resize<T>& r, T* masks) {
  const int64_t n = r.h * r.w;
  at::parallel_for(0, count, 8, [&](int64_t begin, int64_t end) {
    std::vector<T> inside(n + kSigmoidBlock);
    for (int64_t k = begin; k < end; ++k) {
      disc_sigmoid(logits + patches[k] * n, patches[k], r, inside);
      T* mask = masks + k * n;
      std::fill(mask, mask + n, T(0));
      int64_t at = 0;
      for_each_span(patches[k], r.h, r.w, r.half, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) mask[i] = inside[at++];
      });
    }
  });
}

template <class T>
void update_maps(const T* masks, const int64_t* patches, int64_t count, const Resize<T>& r, T* best, int32_t* winner) {
  const int64_t n = r.h * r.w, stride = r.width + kUpsampleLanes;
  at::parallel_for(0, static_cast<int64_t>(r.bands.size()), 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<T[]> wide(new T[2 * count * stride]);
    std::vector<BandMember<T>> members;
    for (int64_t b = begin; b < end; ++b) {
      const TapRun& rows = r.bands[b];
      members.clear();
      for (int64_t k = 0; k < count; ++k) {
        const int64_t patch = patches[k];
        if (!(r.row_in_disc(patch, rows.low) || r.row_in_disc(patch, rows.high))) continue;
        T* top = wide.get() + 2 * members.size() * stride;
        for (const int64_t y : {rows.low, rows.high}) {
          upsample_row(masks + k * n + y * r.w, r.runs, r.low.data(), r.high.data(), top + (y != rows.low) * stride);
        }
        const int64_t x = patch % r.w, reach = r.half[0];
        members.push_back({top, rows.low == rows.high ? top : top + stride, r.first[std::max<int64_t>(x - reach, 0)],
                           r.last[std::min(x + reach, r.w - 1)], static_cast<int32_t>(patch)});
      }
      max_band({members.data(), static_cast<int64_t>(members.size()), rows.end - rows.begin, r.width,
                r.rows.data() + rows.begin},
               best + rows.begin * r.width, winner + rows.begin * r.width);
    }
  });
}

std::tuple<at::Tensor, at::Tensor> max_upsampled_masks_cpu(const at::Tensor& logits, const at::Tensor& pairs,
                                                           const at::Tensor& members, int64_t h, int64_t w,
                                                           int64_t out_h, int64_t out_w, int64_t limit) {
  check_max_upsampled(logits, pairs, members, h, w, out_h, out_w);
  const auto masks = logits.contiguous(), list = pairs.contiguous(), chosen = members.contiguous();
  const int64_t n = h * w, num_pairs = pairs.size(0);
  auto out = at::zeros({num_pairs, out_h, out_w}, logits.options().dtype(accumulate_type(logits)));
  auto winner = at::full({num_pairs, out_h, out_w}, -1, logits.options().dtype(at::kInt));
  if (n == 0 || out.numel() == 0) return {out, winner};
  const int64_t pixels = out_h * out_w;  // not before: for no pairs it may overflow
  const int64_t* pair = list.const_data_ptr<int64_t>();
  const uint8_t* member = bool_bytes(chosen);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "max_upsampled_masks", [&] {
    using T = at::opmath_type<scalar_t>;
    const Resize<T> resize(h, w, out_h, out_w, {limit, false});
    const std::unique_ptr<T[]> values(new T[kMembersAtOnce * n]);
    std::vector<int64_t> patches;
    for (int64_t p = 0; p < num_pairs; ++p) {
      const int64_t b = pair[2 * p];
      TORCH_CHECK_VALUE(b >= 0 && b < logits.size(0), "max_upsampled_masks: no image ", b, " in a batch of ",
                        logits.size(0));
      patches.clear();
      for (int64_t i = 0; i < n; ++i) {
        if (member[p * n + i]) patches.push_back(i);
      }
      const int64_t total = static_cast<int64_t>(patches.size());
      for (int64_t start = 0; start < total; start += kMembersAtOnce) {
        const int64_t count = std::min(kMembersAtOnce, total - start);
        fill_masks(masks.const_data_ptr<scalar_t>() + b * n * n, patches.data() + start, count, resize, values.get());
        update_maps(values.get(), patches.data() + start, count, resize, out.mutable_data_ptr<T>() + p * pixels,
                    winner.mutable_data_ptr<int32_t>() + p * pixels);
      }
    }
  });
  return {out, winner};
}

// Adds the gradient of one map to total [N, N], row by row; neighbouring pixels with the same winner go together.
template <class T>
void add_gradient(const T* grad, const int32_t* winner, const Resize<T>& r, T* total, std::vector<char>& touched) {
  for (int64_t y = 0; y < r.height; ++y) {
    const Tap<T>& row = r.rows[y];
    for (int64_t x = 0; x < r.width;) {
      const int32_t patch = winner[y * r.width + x];
      const int32_t low = r.columns[x].low, high = r.columns[x].high;
      T left = 0, right = 0;
      for (; x < r.width && winner[y * r.width + x] == patch && r.columns[x].low == low; ++x) {
        if (patch < 0) continue;  // the map is 0: so is the gradient, whatever came in
        left += r.low[x] * grad[y * r.width + x];
        right += r.high[x] * grad[y * r.width + x];
      }
      if (patch < 0) continue;
      TORCH_CHECK_VALUE(patch < r.h * r.w, "max_upsampled_masks_backward: no patch ", patch);
      touched[patch] = true;
      T *top = total + patch * r.h * r.w + row.low * r.w, *bottom = total + patch * r.h * r.w + row.high * r.w;
      top[low] += row.low_weight * left;
      top[high] += row.low_weight * right;
      bottom[low] += row.high_weight * left;
      bottom[high] += row.high_weight * right;
    }
  }
}

at::Tensor max_upsampled_masks_backward_cpu(const at::Tensor& grad, const at::Tensor& winner, const at::Tensor& logits,
                                            const at::Tensor& pairs, const at::Tensor& members, int64_t h, int64_t w,
                                            int64_t limit) {
  check_max_upsampled_backward(grad, winner, logits, pairs.size(0));
  const int64_t out_h = winner.size(1), out_w = winner.size(2), n = logits.size(1), images = logits.size(0);
  check_max_upsampled(logits, pairs, members, h, w, out_h, out_w);
  const auto masks = logits.contiguous(), list = pairs.contiguous();
  const auto flow = grad.contiguous(), winners = winner.contiguous();
  auto total = at::zeros(logits.sizes(), logits.options().dtype(accumulate_type(logits)));
  if (total.numel() == 0 || winner.numel() == 0) return total.to(logits.scalar_type());
  const int64_t *pair = list.const_data_ptr<int64_t>(), num_pairs = pairs.size(0), pixels = out_h * out_w;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "max_upsampled_masks_backward", [&] {
    using T = at::opmath_type<scalar_t>;
    const Resize<T> resize(h, w, out_h, out_w, {limit, false});
    const int32_t* won = winners.const_data_ptr<int32_t>();
    T* sum = total.mutable_data_ptr<T>();
    at::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> inside(n + kSigmoidBlock), flows(n);
      for (int64_t b = begin; b < end; ++b) {
        std::vector<char> touched(n);
        for (int64_t p = 0; p < num_pairs; ++p) {
          if (pair[2 * p] != b) continue;
          add_gradient(flow.const_data_ptr<T>() + p * pixels, won + p * pixels, resize, sum + b * n * n, touched);
        }
        for (int64_t patch = 0; patch < n; ++patch) {
          if (!touched[patch]) continue;
          T* row = sum + (b * n + patch) * n;
          std::copy(row, row + n, flows.begin());
          std::fill(row, row + n, T(0));
          disc_sigmoid(masks.const_data_ptr<scalar_t>() + (b * n + patch) * n, patch, resize, inside);
          int64_t at = 0;
          for_each_span(patch, h, w, resize.half, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i, ++at) row[i] = flows[i] * inside[at] * (1 - inside[at]);
          });
        }
      }
    });
  });
  return total.to(logits.scalar_type());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def(
      "max_upsampled_masks(Tensor mask_logits, Tensor pairs, Tensor members, int h, int w, int out_h, int out_w, "
      "int limit) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "max_upsampled_masks_backward(Tensor grad, Tensor winner, Tensor mask_logits, Tensor pairs, Tensor members, "
      "int h, int w, int limit) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("max_upsampled_masks", &max_upsampled_masks_cpu);
  m.impl("max_upsampled_masks_backward", &max_upsampled_masks_backward_cpu);
}

}  // namespace wsss
