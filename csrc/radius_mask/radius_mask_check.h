// Checks of radius_mask that the CPU and the CUDA binding share.
#pragma once
#include <ATen/core/Tensor.h>

#include "radius_mask/radius_mask.h"

namespace wsss {

inline void check_floating(const at::Tensor& x, const char* op, const char* name) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, op, ": ",
                   name, " must be floating point (fp32, fp64, bf16, fp16), got ", type);
}

// The type of a tensor that has passed check_floating.
inline Scalar scalar_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble: return Scalar::f64;
    case at::kHalf: return Scalar::f16;
    case at::kBFloat16: return Scalar::bf16;
    default: return Scalar::f32;
  }
}

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
