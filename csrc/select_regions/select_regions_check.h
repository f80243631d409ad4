// Checks of select_regions that the CPU and the CUDA binding share.
#pragma once
#include "check.h"
#include "radius_mask/radius_mask_check.h"
#include "select_regions/select_regions.h"

namespace wsss {

inline Selection check_select_regions(const at::Tensor& logits, const at::Tensor& scores, const at::Tensor& pairs,
                                      int64_t h, int64_t w, int64_t limit, double threshold, double low, double high,
                                      int64_t max_seeds, int64_t top) {
  check_patch_masks(logits, h, w, "select_regions", "mask_logits");
  check_float32(scores, 3, "select_regions", "scores");
  TORCH_CHECK_VALUE(scores.size(0) == logits.size(0) && scores.size(1) == logits.size(1),
                    "select_regions: scores do not fit mask_logits ", logits.sizes());
  TORCH_CHECK_VALUE(pairs.dim() == 2 && pairs.size(1) == 2, "select_regions: pairs must be [P, 2], got ",
                    pairs.sizes());
  TORCH_CHECK_TYPE(pairs.scalar_type() == at::kLong, "select_regions: pairs must be int64, got ",
                   pairs.scalar_type());
  TORCH_CHECK_VALUE(max_seeds >= 1 && top >= 1, "select_regions: max_seeds and top must be >= 1");
  return {{limit, false}, static_cast<float>(threshold), static_cast<float>(low), static_cast<float>(high),
          max_seeds, std::min(top, h * w)};
}

}  // namespace wsss
