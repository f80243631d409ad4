// Checks of wsss::dense_crf for every device.
#pragma once
#include <ATen/core/Tensor.h>

#include "check.h"
#include "dense_crf/dense_crf.h"

namespace wsss {

inline Mode mode_of(c10::string_view name) {
  TORCH_CHECK_VALUE(name == "fast" || name == "ring" || name == "exact",
                    "dense_crf: mode must be fast, ring or exact, got ", name);
  return name == "fast" ? Mode::fast : name == "ring" ? Mode::ring : Mode::exact;
}

inline void check_dense_crf(const at::Tensor& unary, const at::Tensor& image, double spatial_sigma, double sigma_xy,
                            double sigma_rgb, int64_t iterations, at::IntArrayRef sizes) {
  check_float32(unary, 4, "dense_crf", "unary");
  check_float32(image, 4, "dense_crf", "image");
  const int64_t batch = unary.size(0), h = unary.size(2), w = unary.size(3);
  TORCH_CHECK_VALUE(image.sizes() == at::IntArrayRef({batch, 3, h, w}), "dense_crf: image does not fit unary ",
                    unary.sizes());
  TORCH_CHECK_VALUE(image.device() == unary.device(), "dense_crf: unary and image must be on one device");
  TORCH_CHECK_VALUE(spatial_sigma > 0 && sigma_xy > 0 && sigma_rgb > 0,
                    "dense_crf: the standard deviations must be > 0");
  TORCH_CHECK_VALUE(iterations >= 0, "dense_crf: iterations must be >= 0, got ", iterations);
  TORCH_CHECK_VALUE(sizes.empty() || static_cast<int64_t>(sizes.size()) == 2 * batch,
                    "dense_crf: sizes must be empty or hold a height and a width per image");
  for (size_t i = 0; i < sizes.size(); ++i) {
    TORCH_CHECK_VALUE(sizes[i] >= 0 && sizes[i] <= (i % 2 ? w : h), "dense_crf: sizes must lie inside the batch");
  }
}

}  // namespace wsss
