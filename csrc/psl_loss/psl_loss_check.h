// Checks of psl_loss that the CPU and the CUDA binding share.
#pragma once
#include "check.h"
#include "psl_loss/psl_loss.h"

namespace wsss {

inline void check_psl_tensor(const at::Tensor& x, at::IntArrayRef sizes, at::ScalarType type, const at::Tensor& logits,
                             const char* op, const char* name) {
  TORCH_CHECK_VALUE(x.sizes() == sizes, op, ": ", name, " must be ", sizes, ", got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == type, op, ": ", name, " must be ", type, ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.device() == logits.device(), op, ": logits and ", name, " must be on one device");
}

inline void check_psl_inputs(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& present,
                             const char* op) {
  check_floating(logits, op, "logits");
  TORCH_CHECK_TYPE(logits.scalar_type() != at::kDouble, op, ": logits must be fp32, bf16 or fp16, got Double");
  TORCH_CHECK_VALUE(logits.dim() == 4 && logits.size(1) >= 1 && logits.size(1) <= kPslMaxClasses, op,
                    ": logits must be [B, K, H, W] with K in [1, ", kPslMaxClasses, "], got ", logits.sizes());
  check_psl_tensor(labels, {logits.size(0), logits.size(2), logits.size(3)}, at::kLong, logits, op, "labels");
  check_psl_tensor(present, {logits.size(0), logits.size(1) - 1}, at::kBool, logits, op, "present");
}

inline void check_psl_loss(const at::Tensor& logits, const at::Tensor& log_weights, const at::Tensor& labels,
                           const at::Tensor& present) {
  check_psl_inputs(logits, labels, present, "psl_loss");
  check_psl_tensor(log_weights, logits.sizes().slice(0, 2), at::kFloat, logits, "psl_loss", "log_weights");
}

inline void check_psl_loss_backward(const at::Tensor& labelled, const at::Tensor& online, const at::Tensor& logits,
                                    const at::Tensor& labels, const at::Tensor& present, const at::Tensor& mask,
                                    const at::Tensor& counts) {
  const char* op = "psl_loss_backward";
  check_psl_inputs(logits, labels, present, op);
  check_psl_tensor(labelled, {logits.size(0)}, at::kFloat, logits, op, "grad_labelled");
  check_psl_tensor(online, {logits.size(0)}, at::kFloat, logits, op, "grad_online");
  check_psl_tensor(mask, labels.sizes(), at::kByte, logits, op, "mask");
  check_psl_tensor(counts, {logits.size(0), 2}, at::kLong, logits, op, "counts");
}

}  // namespace wsss
