// Checks of c2am_pool that the CPU and the CUDA binding share.
#pragma once
#include "c2am_pool/c2am_pool.h"
#include "check.h"

namespace wsss {

inline void check_c2am_pool(const at::Tensor& features, const at::Tensor& logits, const char* op) {
  check_floating(features, op, "features");
  TORCH_CHECK_VALUE(features.dim() == 3 && features.size(2) >= 1, op,
                    ": features must be [B, D, N] with N >= 1, got ", features.sizes());
  TORCH_CHECK_VALUE(logits.sizes() == at::IntArrayRef({features.size(0), features.size(2)}), op, ": logits must be [",
                    features.size(0), ", ", features.size(2), "], got ", logits.sizes());
  TORCH_CHECK_TYPE(logits.scalar_type() == accumulate_type(features), op, ": logits must be ",
                   accumulate_type(features), ", got ", logits.scalar_type());
  TORCH_CHECK_VALUE(features.device() == logits.device(), op, ": features and logits must be on one device");
}

inline void check_c2am_pool_backward(const at::Tensor& grad_foreground, const at::Tensor& grad_background,
                                     const at::Tensor& features, const at::Tensor& logits) {
  const char* op = "c2am_pool_backward";
  check_c2am_pool(features, logits, op);
  for (const at::Tensor& grad : {grad_foreground, grad_background}) {
    TORCH_CHECK_VALUE(grad.sizes() == features.sizes().slice(0, 2), op, ": gradients must be ",
                      features.sizes().slice(0, 2), ", got ", grad.sizes());
    TORCH_CHECK_TYPE(grad.scalar_type() == logits.scalar_type(), op, ": gradients must be ", logits.scalar_type(),
                     ", got ", grad.scalar_type());
    TORCH_CHECK_VALUE(grad.device() == logits.device(), op, ": tensors must be on one device");
  }
}

}  // namespace wsss
