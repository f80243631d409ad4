// Checks of max_upsampled_masks that the CPU and the CUDA binding share.
#pragma once
#include "max_upsampled_masks/max_upsampled_masks.h"
#include "radius_mask/radius_mask_check.h"

namespace wsss {

inline void check_max_upsampled(const at::Tensor& logits, const at::Tensor& pairs, const at::Tensor& members, int64_t h,
                                int64_t w, int64_t out_h, int64_t out_w) {
  check_patch_masks(logits, h, w, "max_upsampled_masks", "mask_logits");
  TORCH_CHECK_VALUE(pairs.dim() == 2 && pairs.size(1) == 2, "max_upsampled_masks: pairs must be [P, 2], got ",
                    pairs.sizes());
  TORCH_CHECK_TYPE(pairs.scalar_type() == at::kLong, "max_upsampled_masks: pairs must be int64, got ",
                   pairs.scalar_type());
  TORCH_CHECK_VALUE(members.sizes() == at::IntArrayRef({pairs.size(0), h * w}),
                    "max_upsampled_masks: members must be [P, N], got ", members.sizes());
  TORCH_CHECK_TYPE(members.scalar_type() == at::kBool, "max_upsampled_masks: members must be bool, got ",
                   members.scalar_type());
  TORCH_CHECK_VALUE(pairs.device() == logits.device() && members.device() == logits.device(),
                    "max_upsampled_masks: mask_logits, pairs and members must be on one device");
  TORCH_CHECK_VALUE(out_h >= 1 && out_w >= 1, "max_upsampled_masks: size must be >= 1, got (", out_h, ", ", out_w, ")");
}

inline void check_max_upsampled_backward(const at::Tensor& grad, const at::Tensor& winner, const at::Tensor& logits,
                                         int64_t num_pairs) {
  TORCH_CHECK_VALUE(winner.dim() == 3 && winner.size(0) == num_pairs,
                    "max_upsampled_masks_backward: winner must be [P, Ho, Wo], got ", winner.sizes());
  TORCH_CHECK_TYPE(winner.scalar_type() == at::kInt, "max_upsampled_masks_backward: winner must be int32, got ",
                   winner.scalar_type());
  TORCH_CHECK_VALUE(grad.sizes() == winner.sizes(), "max_upsampled_masks_backward: grad must be ", winner.sizes(),
                    ", got ", grad.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == accumulate_type(logits), "max_upsampled_masks_backward: grad must be ",
                   accumulate_type(logits), ", got ", grad.scalar_type());
  TORCH_CHECK_VALUE(grad.device() == logits.device() && winner.device() == logits.device(),
                    "max_upsampled_masks_backward: tensors must be on one device");
}

}  // namespace wsss
