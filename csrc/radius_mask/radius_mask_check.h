// Checks of radius_mask that the CPU and the CUDA binding share.
#pragma once
#include "check.h"
#include "radius_mask/radius_mask.h"

namespace wsss {

// x is [B, N, N] over a grid (h, w) with h * w = N, both >= 0.
inline void check_patch_masks(const at::Tensor& x, int64_t h, int64_t w, const char* op, const char* name) {
  check_floating(x, op, name);
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(1) == x.size(2), op, ": ", name, " must be [B, N, N], got ", x.sizes());
  const int64_t n = x.size(1);  // by division: h * w may overflow
  TORCH_CHECK_VALUE(h >= 0 && w >= 0 && (h == 0 ? n == 0 : n % h == 0 && n / h == w), op, ": grid must have h * w = ",
                    n, " patches, got (", h, ", ", w, ")");
}

inline void check_radius_mask_backward(const at::Tensor& grad, const at::Tensor& out, int64_t h, int64_t w) {
  check_patch_masks(out, h, w, "radius_mask_backward", "out");
  TORCH_CHECK_VALUE(grad.sizes() == out.sizes(), "radius_mask_backward: grad must be ", out.sizes(), ", got ",
                    grad.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == out.scalar_type(), "radius_mask_backward: grad must be ", out.scalar_type(),
                   ", got ", grad.scalar_type());
}

}  // namespace wsss
