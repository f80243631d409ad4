// The walk over the pairs of one image, strip by strip. No result depends on how the work is spread over threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "patch_token_contrast/contrast_check.h"

namespace wsss {
namespace {

constexpr int64_t kRowsAtOnce = 32;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

at::Tensor floats(int64_t n) { return at::empty({n}, at::kFloat); }

}  // namespace

UnitTokens::UnitTokens(const at::Tensor& tokens, const Chosen& chosen, int64_t group)
    : count_(static_cast<int64_t>(chosen.places.size())), rows_(round_up(count_, group)), labels_(chosen.labels),
      norms_(count_) {
  const int64_t d = tokens.size(1);
  labels_.resize(rows_, -1);
  data_ = floats(rows_ * round_up(d, kPanel));
  const auto source = tokens.to(at::kFloat).contiguous();
  const float* from = source.const_data_ptr<float>();
  float* to = data_.mutable_data_ptr<float>();
  at::parallel_for(0, rows_, kRowsAtOnce, [&](int64_t begin, int64_t end) {
    std::vector<float> line(d);
    for (int64_t i = begin; i < end; ++i) {
      if (i < count_) {
        const float* token = from + chosen.places[i] * d;
        std::copy(token, token + d, line.begin());
        norms_[i] = normalise(line.data(), d);
      } else {
        std::fill(line.begin(), line.end(), 0.0f);
      }
      put_row(line.data(), d, i, rows_, to);
    }
  });
}

PairSums contrast_pairs(const UnitTokens& tokens, int64_t d, PairWeights weights, const std::vector<int64_t>& places,
                        float* gradient) {
  const Units units = tokens.units();
  const int64_t panels = round_up(d, kPanel) / kPanel, strip_width = std::min(kStrip, units.rows);
  std::vector<float*> lines;
  for (const int64_t place : places) lines.push_back(gradient + (gradient ? place * d : 0));
  const auto transposed = floats(strip_width * panels * kPanel);
  const auto products = floats(gradient ? strip_width * units.rows : 0);
  Strip strip{units, d, 0, 0, weights.positive, weights.negative, transposed.const_data_ptr<float>(),
              gradient ? products.mutable_data_ptr<float>() : nullptr};
  PairSums total;
  std::vector<PairSums> parts;
  for (; strip.begin < units.rows; strip.begin += kStrip) {
    strip.width = std::min(kStrip, units.rows - strip.begin);
    const int64_t last = strip.begin + strip.width;
    parts.assign(round_up(last, kRowsAtOnce) / kRowsAtOnce, {});
    at::parallel_for(0, panels, 4, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        transpose_units(units, strip.begin, strip.width, d, p, transposed.mutable_data_ptr<float>());
      }
    });
    at::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        parts[p] = similarity(strip, p * kRowsAtOnce, std::min((p + 1) * kRowsAtOnce, last));
      }
    });
    for (int64_t p = 0; p < static_cast<int64_t>(parts.size()); ++p) {
      const double times = p * kRowsAtOnce < strip.begin ? 2 : 1;  // the mirror image of the pair
      total.positive += times * parts[p].positive;
      total.negative += times * parts[p].negative;
    }
    if (!gradient) continue;
    at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) add_gradient(strip, last, p, lines.data());
    });
  }
  if (gradient) {
    at::parallel_for(0, units.count, kRowsAtOnce, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) through_norm(lines[i], units, i, d, tokens.norms()[i]);
    });
  }
  return total;
}

}  // namespace wsss
