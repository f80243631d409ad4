// Checks of wsss::lattice_filter for every device.
#pragma once
#include <ATen/core/Tensor.h>

#include "check.h"

namespace wsss {

inline void check_lattice_filter(const at::Tensor& image, const at::Tensor& planes, double sigma_xy, double sigma_rgb) {
  check_float32(image, 4, "lattice_filter", "image");
  check_float32(planes, 4, "lattice_filter", "planes");
  TORCH_CHECK_VALUE(image.sizes() == at::IntArrayRef({planes.size(0), 3, planes.size(2), planes.size(3)}),
                    "lattice_filter: image does not fit planes ", planes.sizes());
  TORCH_CHECK_VALUE(image.device() == planes.device(), "lattice_filter: image and planes must be on one device");
  TORCH_CHECK_VALUE(sigma_xy > 0 && sigma_rgb > 0, "lattice_filter: the standard deviations must be > 0");
}

}  // namespace wsss
