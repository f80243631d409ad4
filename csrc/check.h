// Checks that the bindings share. The Python side has checked ranges already; these guard direct calls of torch.ops.
#pragma once
#include <ATen/core/Tensor.h>

namespace wsss {

inline void check_float32(const at::Tensor& x, int64_t dims, const char* op, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == dims, op, ": ", name, " must have ", dims, " dimensions, got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, op, ": ", name, " must be float32, got ", x.scalar_type());
}

}  // namespace wsss
