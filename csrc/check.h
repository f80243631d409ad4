// Checks that the bindings share. The Python side has checked ranges already; these guard direct calls of torch.ops.
#pragma once
#include <ATen/core/Tensor.h>

#include "scalar.h"

namespace wsss {

inline void check_float32(const at::Tensor& x, int64_t dims, const char* op, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == dims, op, ": ", name, " must have ", dims, " dimensions, got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, op, ": ", name, " must be float32, got ", x.scalar_type());
}

// The elements of a contiguous bool tensor as bytes: a view of other memory may hold True in other ways than 1.
inline const uint8_t* bool_bytes(const at::Tensor& x) {
  return reinterpret_cast<const uint8_t*>(x.const_data_ptr<bool>());
}

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

// What a tensor that has passed check_floating is computed in: float32, float64 for float64.
inline at::ScalarType accumulate_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace wsss
