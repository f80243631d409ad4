// Checks that the bindings share. The Python side has checked ranges already; these guard direct calls of torch.ops.
#pragma once
#include <ATen/core/Tensor.h>

namespace wsss {

inline void check_float32(const at::Tensor& x, int64_t dims, const char* op, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == dims, op, ": ", name, " must have ", dims, " dimensions, got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, op, ": ", name, " must be float32, got ", x.scalar_type());
}

// The elements of a contiguous bool tensor as bytes: a view of other memory may hold True in other ways than 1.
inline const uint8_t* bool_bytes(const at::Tensor& x) {
  return reinterpret_cast<const uint8_t*>(x.const_data_ptr<bool>());
}

}  // namespace wsss
