// Schema of wsss::gaussian_filter and its CPU implementation.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "check.h"
#include "gaussian/gaussian.h"

namespace wsss {
namespace {

at::Tensor gaussian_filter_cpu(const at::Tensor& image, const at::Tensor& planes, double sigma_xy, double sigma_rgb) {
  check_float32(image, 4, "gaussian_filter", "image");
  check_float32(planes, 4, "gaussian_filter", "planes");
  const int64_t batch = planes.size(0), channels = planes.size(1), h = planes.size(2), w = planes.size(3), n = h * w;
  TORCH_CHECK_VALUE(image.sizes() == at::IntArrayRef({batch, 3, h, w}), "gaussian_filter: image does not fit planes ",
                    planes.sizes());
  TORCH_CHECK_VALUE(sigma_xy > 0 && sigma_rgb > 0, "gaussian_filter: the standard deviations must be > 0");
  const auto colours = image.contiguous(), values = planes.contiguous();
  auto out = at::empty({batch, channels, h, w}, planes.options());
  if (out.numel() == 0) return out;
  const int64_t width = lattice_width(channels);
  over_images(batch, [&](int64_t b) {
    const PixelGaussian sums(colours.const_data_ptr<float>() + b * 3 * n, h, w, w, n, static_cast<float>(sigma_xy),
                             static_cast<float>(sigma_rgb));
    const float* from = values.const_data_ptr<float>() + b * channels * n;
    float* to = out.mutable_data_ptr<float>() + b * channels * n;
    Buffer<float> rows(n * width);
    std::fill(rows.get(), rows.get() + n * width, 0.0f);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = 0; i < n; ++i) rows[i * width + c] = from[c * n + i];
    }
    sums.filter(rows.get(), width, 1.0f, rows.get());
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = 0; i < n; ++i) to[c * n + i] = rows[i * width + c];
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def("gaussian_filter(Tensor image, Tensor planes, float sigma_xy, float sigma_rgb) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(wsss, CPU, m) { m.impl("gaussian_filter", &gaussian_filter_cpu); }

}  // namespace wsss
