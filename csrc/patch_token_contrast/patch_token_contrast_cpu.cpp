// Schema of wsss::patch_token_contrast and its CPU implementation.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "patch_token_contrast/contrast_check.h"

namespace wsss {
namespace {

// Labels numbered from 0 in ascending order; the numbers of ordered pairs are added to `positive` and `negative`.
Chosen choose(const int64_t* labels, int64_t n, int64_t ignore_index, int64_t& positive, int64_t& negative) {
  Chosen chosen;
  std::vector<int64_t> values;
  for (int64_t i = 0; i < n; ++i) {
    if (labels[i] == ignore_index) continue;
    chosen.places.push_back(i);
    values.push_back(labels[i]);
  }
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  std::vector<int64_t> counts(values.size());
  for (const int64_t i : chosen.places) {
    const auto rank = std::lower_bound(values.begin(), values.end(), labels[i]) - values.begin();
    chosen.labels.push_back(static_cast<int32_t>(rank));
    ++counts[rank];
  }
  const auto valid = static_cast<int64_t>(chosen.places.size());
  for (const int64_t count : counts) {
    positive += count * (count - 1);
    negative += count * (valid - count);
  }
  return chosen;
}

std::tuple<at::Tensor, at::Tensor> patch_token_contrast_cpu(const at::Tensor& tokens, const at::Tensor& labels,
                                                            int64_t ignore_index, bool with_gradient) {
  check_tokens(tokens, "patch_token_contrast", "tokens");
  check_labels(labels, tokens, "patch_token_contrast");
  const int64_t images = tokens.size(0), n = tokens.size(1), d = tokens.size(2);
  const auto classes = labels.to(at::kLong).contiguous();
  int64_t positive = 0, negative = 0;
  std::vector<Chosen> chosen;
  for (int64_t b = 0; b < images; ++b) {
    chosen.push_back(choose(classes.const_data_ptr<int64_t>() + b * n, n, ignore_index, positive, negative));
  }
  const auto options = tokens.options().dtype(at::kFloat);
  auto gradient = with_gradient ? at::zeros({images, n, d}, options) : at::empty({0}, options);
  // Each unordered pair counts twice in the loss.
  const PairWeights weights{static_cast<float>(-1 / (positive + 1.0)), static_cast<float>(1 / (negative + 1.0))};
  PairSums sums;
  for (int64_t b = 0; b < images; ++b) {
    if (chosen[b].places.empty()) continue;
    const UnitTokens units(tokens.select(0, b), chosen[b], kPanel);
    float* rows = with_gradient ? gradient.mutable_data_ptr<float>() + b * n * d : nullptr;
    const PairSums part = contrast_pairs(units, d, weights, chosen[b].places, rows);
    sums.positive += part.positive;
    sums.negative += part.negative;
  }
  return {at::full({}, contrast_loss(sums, positive, negative), options), gradient};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def("patch_token_contrast(Tensor tokens, Tensor labels, int ignore_index, bool with_gradient) -> (Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(wsss, CPU, m) { m.impl("patch_token_contrast", &patch_token_contrast_cpu); }

}  // namespace wsss
