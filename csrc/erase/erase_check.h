// Checks of erase that the CPU and the CUDA binding share.
#pragma once
#include "check.h"
#include "erase/erase.h"

namespace wsss {

inline void check_erase_maps(const at::Tensor& maps, at::ScalarType type, int64_t height, int64_t width,
                             const char* op) {
  TORCH_CHECK_VALUE(maps.dim() == 3, op, ": maps must be [B, h, w], got ", maps.sizes());
  TORCH_CHECK_TYPE(maps.scalar_type() == type, op, ": maps must be ", type, ", got ", maps.scalar_type());
  TORCH_CHECK_VALUE(maps.size(1) >= 1 && maps.size(2) >= 1 && maps.size(2) <= kEraseMaxSide / maps.size(1), op,
                    ": maps must have 1 to 2^24 cells, got ", maps.sizes());
  TORCH_CHECK_VALUE(0 <= height && height <= kEraseMaxSide && 0 <= width && width <= kEraseMaxSide, op,
                    ": size must be (H, W) of 0 to 2^24 pixels, got (", height, ", ", width, ")");
}

// Maps whose type says what is computed in.
inline void check_erase_maps(const at::Tensor& maps, int64_t height, int64_t width, const char* op) {
  TORCH_CHECK_TYPE(maps.scalar_type() == at::kFloat || maps.scalar_type() == at::kDouble, op,
                   ": maps must be float32 or float64, got ", maps.scalar_type());
  check_erase_maps(maps, maps.scalar_type(), height, width, op);
}

inline void check_erase_scalar(const at::Tensor& x, const at::Tensor& maps, const char* op, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 0, op, ": ", name, " must be a scalar, got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == maps.scalar_type(), op, ": ", name, " must be ", maps.scalar_type(), ", got ",
                   x.scalar_type());
  TORCH_CHECK_VALUE(x.device() == maps.device(), op, ": ", name, " and maps must be on one device");
}

inline void check_erase(const at::Tensor& images, const at::Tensor& maps, const char* op) {
  check_floating(images, op, "images");
  TORCH_CHECK_VALUE(images.dim() == 4 && images.size(1) == kEraseColours, op, ": images must be [B, 3, H, W], got ",
                    images.sizes());
  check_erase_maps(maps, accumulate_type(images), images.size(2), images.size(3), op);
  TORCH_CHECK_VALUE(maps.size(0) == images.size(0), op, ": maps must be [", images.size(0), ", h, w], got ",
                    maps.sizes());
  TORCH_CHECK_VALUE(images.device() == maps.device(), op, ": images and maps must be on one device");
}

inline void check_erase_soft_backward(const at::Tensor& grad, const at::Tensor& images, const at::Tensor& maps,
                                      const at::Tensor& maximum) {
  const char* op = "erase_soft_backward";
  check_erase(images, maps, op);
  check_erase_scalar(maximum, maps, op, "maximum");
  TORCH_CHECK_VALUE(grad.sizes() == images.sizes(), op, ": grad must be ", images.sizes(), ", got ", grad.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == images.scalar_type(), op, ": grad must be ", images.scalar_type(), ", got ",
                   grad.scalar_type());
  TORCH_CHECK_VALUE(grad.device() == images.device(), op, ": grad and images must be on one device");
}

}  // namespace wsss
