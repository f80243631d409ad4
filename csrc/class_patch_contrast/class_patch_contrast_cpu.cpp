// Schema of wsss::class_patch_contrast and its CPU implementation.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "check.h"
#include "patch_token_contrast/contrast_check.h"

namespace wsss {
namespace {

// Class c has the label c + 1; patches of other labels get 0, the label of no class.
Chosen choose_patches(const int64_t* labels, int64_t n, int64_t classes, int64_t ignore_index) {
  Chosen chosen;
  for (int64_t i = 0; i < n; ++i) {
    if (labels[i] == ignore_index) continue;
    chosen.places.push_back(i);
    chosen.labels.push_back(labels[i] >= 1 && labels[i] <= classes ? static_cast<int32_t>(labels[i]) : 0);
  }
  return chosen;
}

Chosen choose_classes(const uint8_t* present, int64_t classes) {
  Chosen chosen;
  for (int64_t c = 0; c < classes; ++c) {
    if (!present[c]) continue;
    chosen.places.push_back(c);
    chosen.labels.push_back(static_cast<int32_t>(c + 1));
  }
  return chosen;
}

void check_arguments(const at::Tensor& class_tokens, const at::Tensor& patch_tokens, const at::Tensor& labels,
                     const at::Tensor& present) {
  const char* op = "class_patch_contrast";
  check_tokens(class_tokens, op, "class_tokens");
  check_tokens(patch_tokens, op, "patch_tokens");
  TORCH_CHECK_VALUE(patch_tokens.size(0) == class_tokens.size(0) && patch_tokens.size(2) == class_tokens.size(2), op,
                    ": patch_tokens must be [", class_tokens.size(0), ", N, ", class_tokens.size(2), "], got ",
                    patch_tokens.sizes());
  check_labels(labels, patch_tokens, op);
  TORCH_CHECK_TYPE(present.scalar_type() == at::kBool, op, ": present must be bool, got ", present.scalar_type());
  TORCH_CHECK_VALUE(present.sizes() == class_tokens.sizes().slice(0, 2), op, ": present must be ",
                    class_tokens.sizes().slice(0, 2), ", got ", present.sizes());
}

std::tuple<at::Tensor, at::Tensor> class_patch_contrast_cpu(const at::Tensor& class_tokens,
                                                            const at::Tensor& patch_tokens, const at::Tensor& labels,
                                                            const at::Tensor& present, int64_t ignore_index,
                                                            bool with_gradient) {
  check_arguments(class_tokens, patch_tokens, labels, present);
  const int64_t images = class_tokens.size(0), c = class_tokens.size(1), d = class_tokens.size(2);
  const int64_t n = patch_tokens.size(1);
  const auto classes = labels.to(at::kLong).contiguous(), tags = present.contiguous();
  int64_t positive = 0, negative = 0;
  std::vector<Chosen> rows, columns;
  for (int64_t b = 0; b < images; ++b) {
    rows.push_back(choose_classes(bool_bytes(tags) + b * c, c));
    columns.push_back(choose_patches(classes.const_data_ptr<int64_t>() + b * n, n, c, ignore_index));
    int64_t own = 0;
    for (const int32_t label : columns[b].labels) own += label > 0 && bool_bytes(tags)[b * c + label - 1];
    positive += own;
    negative += static_cast<int64_t>(rows[b].places.size() * columns[b].places.size()) - own;
  }
  const auto options = class_tokens.options().dtype(at::kFloat);
  auto gradient = with_gradient ? at::zeros({images, c, d}, options) : at::empty({0}, options);
  const PairWeights weights{static_cast<float>(-0.5 / (positive + 1.0)), static_cast<float>(0.5 / (negative + 1.0))};
  PairSums sums;
  for (int64_t b = 0; b < images; ++b) {
    if (rows[b].places.empty() || columns[b].places.empty()) continue;
    const UnitTokens classes_of(class_tokens.select(0, b), rows[b], kGroup);
    const UnitTokens patches_of(patch_tokens.select(0, b), columns[b], kPanel);
    float* lines = with_gradient ? gradient.mutable_data_ptr<float>() + b * c * d : nullptr;
    const PairSums part = contrast_pairs(classes_of, patches_of, d, weights, rows[b].places, lines);
    sums.positive += part.positive;
    sums.negative += part.negative;
  }
  return {at::full({}, contrast_loss(sums, positive, negative), options), gradient};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def(
      "class_patch_contrast(Tensor class_tokens, Tensor patch_tokens, Tensor labels, Tensor present, "
      "int ignore_index, bool with_gradient) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(wsss, CPU, m) { m.impl("class_patch_contrast", &class_patch_contrast_cpu); }

}  // namespace wsss
