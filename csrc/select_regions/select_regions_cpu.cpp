// Schema of wsss::select_regions and its CPU implementation.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "select_regions/select_regions_check.h"

namespace wsss {
namespace {

// One (image, class) pair: the candidates in order of confidence and their regions as bits.
class Pair {
 public:
  Pair(const Selection& s, int64_t h, int64_t w)
      : s_(s), h_(h), w_(w), n_(h * w), blocks_((n_ + kSelectBlock - 1) / kSelectBlock), words_(blocks_ * kSelectBlock / 64),
        half_(half_widths(s.disc, h, w)), row_(blocks_ * kSelectBlock, kOutside) {}

  // scores of the class, one every `stride` values; relative confidence = score / peak
  template <class T>
  void select(const T* logits, const float* scores, int64_t stride, float peak, const int32_t* winner, int32_t label,
              bool* members, int64_t* seeds) {
    order_.clear();
    confidence_.resize(n_);
    for (int64_t i = 0; i < n_; ++i) {
      if (winner[i] != label) continue;
      order_.push_back(i);
      confidence_[i] = scores[i * stride] / peak;
    }
    std::stable_sort(order_.begin(), order_.end(),
                     [this](int64_t a, int64_t b) { return confidence_[a] > confidence_[b]; });
    const int64_t count = std::min<int64_t>(static_cast<int64_t>(order_.size()), s_.top);
    regions_.resize(count * words_);
    for (int64_t t = 0; t < count; ++t) pack(logits + order_[t] * n_, order_[t], regions_.data() + t * words_);
    expand(count, members, seeds);
  }

 private:
  static constexpr float kOutside = -std::numeric_limits<float>::infinity();

  template <class T>
  void pack(const T* logits, int64_t patch, uint64_t* region) {
    for_each_span(patch, h_, w_, half_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) row_[i] = static_cast<float>(logits[i]);
    });
    select_pack(row_.data(), blocks_, s_.threshold, region);
    for_each_span(patch, h_, w_, half_, [&](int64_t begin, int64_t end) {
      std::fill(row_.begin() + begin, row_.begin() + end, kOutside);
    });
  }

  void expand(int64_t count, bool* members, int64_t* seeds) {
    open_.assign(count, true);
    shared_.resize(count);
    int64_t seed = 0;
    for (int64_t turn = 0; turn < s_.max_seeds; ++turn) {
      while (seed < count && !open_[seed]) ++seed;  // what is closed stays closed
      if (seed == count) return;
      seeds[turn] = order_[seed];
      const uint64_t* region = regions_.data() + seed * words_;
      select_overlaps(regions_.data(), region, count, words_, shared_.data());
      const float area = std::max(static_cast<float>(shared_[seed]), kLeastArea);
      for (int64_t t = 0; t < count; ++t) {
        const float ratio = static_cast<float>(shared_[t]) / area;
        const bool joins = t == seed || (ratio >= s_.low && ratio <= s_.high);
        if (joins) members[order_[t]] = true;
        if (joins || ratio > s_.high) open_[t] = false;
      }
    }
  }

  const Selection s_;
  const int64_t h_, w_, n_, blocks_, words_;
  const std::vector<int64_t> half_;
  std::vector<float> row_, confidence_;
  std::vector<int64_t> order_, shared_;
  std::vector<uint64_t> regions_;
  std::vector<char> open_;
};

std::tuple<at::Tensor, at::Tensor> select_regions_cpu(const at::Tensor& logits, const at::Tensor& scores,
                                                      const at::Tensor& pairs, int64_t h, int64_t w, int64_t limit,
                                                      double threshold, double low, double high, int64_t max_seeds,
                                                      int64_t top) {
  const Selection s =
      check_select_regions(logits, scores, pairs, h, w, limit, threshold, low, high, max_seeds, top);
  const int64_t images = scores.size(0), n = scores.size(1), c = scores.size(2), num_pairs = pairs.size(0);
  auto members = at::zeros({num_pairs, n}, scores.options().dtype(at::kBool));
  auto seeds = at::full({num_pairs, max_seeds}, -1, scores.options().dtype(at::kLong));
  if (members.numel() == 0) return {members, seeds};
  const auto masks = logits.contiguous(), confidences = scores.contiguous(), list = pairs.contiguous();
  const float* score = confidences.const_data_ptr<float>();
  const int64_t* pair = list.const_data_ptr<int64_t>();
  std::vector<char> wanted(images);
  for (int64_t p = 0; p < num_pairs; ++p) {
    const int64_t b = pair[2 * p], k = pair[2 * p + 1];
    TORCH_CHECK_VALUE(b >= 0 && b < images && k >= 0 && k < c, "select_regions: pair (", b, ", ", k,
                      ") is outside of [", images, ", ", c, "]");
    wanted[b] = true;
  }
  std::vector<float> peak(images * c);
  std::vector<int32_t> winner(images * n);
  at::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      if (!wanted[b]) continue;
      select_peaks(score + b * n * c, n, c, peak.data() + b * c);
      select_winners(score + b * n * c, peak.data() + b * c, n, c, winner.data() + b * n);
    }
  });
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "select_regions", [&] {
    const scalar_t* mask = masks.const_data_ptr<scalar_t>();
    bool* member = members.mutable_data_ptr<bool>();
    int64_t* seed = seeds.mutable_data_ptr<int64_t>();
    at::parallel_for(0, num_pairs, 1, [&](int64_t begin, int64_t end) {
      Pair work(s, h, w);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t b = pair[2 * p], k = pair[2 * p + 1];
        work.select(mask + b * n * n, score + b * n * c + k, c, peak[b * c + k], winner.data() + b * n,
                    static_cast<int32_t>(k), member + p * n, seed + p * max_seeds);
      }
    });
  });
  return {members, seeds};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def(
      "select_regions(Tensor mask_logits, Tensor scores, Tensor pairs, int h, int w, int limit, float threshold, "
      "float low, float high, int max_seeds, int top) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(wsss, CPU, m) { m.impl("select_regions", &select_regions_cpu); }

}  // namespace wsss
