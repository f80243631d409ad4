// What the CPU bindings of patch_token_contrast and class_patch_contrast share: checks and tokens side by side; and the
// walk over the pairs of one image.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "patch_token_contrast/contrast.h"

namespace wsss {

inline void check_tokens(const at::Tensor& x, const char* op, const char* name) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, op, ": ", name,
                   " must be fp32, bf16 or fp16, got ", type);
  TORCH_CHECK_VALUE(x.dim() == 3, op, ": ", name, " must have 3 dimensions, got ", x.sizes());
}

inline void check_labels(const at::Tensor& labels, const at::Tensor& tokens, const char* op) {
  TORCH_CHECK_TYPE(at::isIntegralType(labels.scalar_type(), false), op, ": labels must hold integers, got ",
                   labels.scalar_type());
  TORCH_CHECK_VALUE(labels.dim() == 2 && labels.size(0) == tokens.size(0) && labels.size(1) == tokens.size(1), op,
                    ": labels must be [", tokens.size(0), ", ", tokens.size(1), "], got ", labels.sizes());
}

// The tokens of one image that take part: their places, ascending, and labels in any numbering.
struct Chosen {
  std::vector<int64_t> places;
  std::vector<int32_t> labels;
};

// Their unit vectors. `tokens` [N, D] of any floating type.
class UnitTokens {
 public:
  // The number of rows is rounded up to a multiple of `group`.
  UnitTokens(const at::Tensor& tokens, const Chosen& chosen, int64_t group);
  Units units() const { return {data_.const_data_ptr<float>(), labels_.data(), rows_, count_}; }
  const std::vector<double>& norms() const { return norms_; }

 private:
  int64_t count_, rows_;
  std::vector<int32_t> labels_;
  std::vector<double> norms_;
  at::Tensor data_;
};

// Weights in the gradient with respect to a unit vector, pos_weight * sign(cos) * the other vector, summed over pairs.
struct PairWeights {
  float positive, negative;
};

// Sums of |cos| over all ordered pairs of two tokens. Unless `gradient` [N, D] is null, its rows at `places`, zero
// before, are set to the gradient of the tokens.
PairSums contrast_pairs(const UnitTokens& tokens, int64_t d, PairWeights weights, const std::vector<int64_t>& places,
                        float* gradient);

// The loss from the sums and the numbers of pairs.
inline double contrast_loss(const PairSums& sums, int64_t positive, int64_t negative) {
  return 0.5 * (1 - sums.positive / (positive + 1.0)) + 0.5 * sums.negative / (negative + 1.0);
}

}  // namespace wsss
