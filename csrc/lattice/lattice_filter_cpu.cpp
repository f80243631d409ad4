// Schema of wsss::lattice_filter and its CPU implementation.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "lattice/lattice.h"
#include "lattice/lattice_filter_check.h"

namespace wsss {
namespace {

void filter_one(const float* image, const float* planes, float* out, int64_t channels, int64_t h, int64_t w,
                float sigma_xy, float sigma_rgb) {
  constexpr int64_t kChunk = 64;
  const int64_t n = h * w, width = lattice_width(channels);
  const Lattice lattice(pixel_features(image, h, w, w, n, sigma_xy, sigma_rgb), n, 5);
  Buffer<float> rows(n * width), table(lattice.table_size(width));
  at::parallel_for(0, n, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kChunk) {
      const int64_t stop = std::min(end, i + kChunk);
      for (int64_t c = 0; c < width; ++c) {
        for (int64_t p = i; p < stop; ++p) rows[p * width + c] = c < channels ? planes[c * n + p] : 0.0f;
      }
    }
  });
  lattice.splat(rows.get(), width, table.get());
  lattice.blur(table.get(), width);
  at::parallel_for(0, n, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kChunk) {
      const int64_t stop = std::min(end, i + kChunk);
      std::fill(rows.get() + i * width, rows.get() + stop * width, 0.0f);
      lattice.slice(table.get(), width, lattice.slice_factor(), i, stop, rows.get() + i * width, rows.get() + i * width);
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t p = i; p < stop; ++p) out[c * n + p] = rows[p * width + c];
      }
    }
  });
}

at::Tensor lattice_filter_cpu(const at::Tensor& image, const at::Tensor& planes, double sigma_xy, double sigma_rgb) {
  check_lattice_filter(image, planes, sigma_xy, sigma_rgb);
  const int64_t batch = planes.size(0), channels = planes.size(1), h = planes.size(2), w = planes.size(3);
  const auto colours = image.contiguous(), values = planes.contiguous();
  auto out = at::empty({batch, channels, h, w}, planes.options());
  if (out.numel() == 0) return out;
  const float* from_image = colours.const_data_ptr<float>();
  const float* from = values.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  over_images(batch, [&](int64_t b) {
    filter_one(from_image + b * 3 * h * w, from + b * channels * h * w, to + b * channels * h * w, channels, h, w,
               static_cast<float>(sigma_xy), static_cast<float>(sigma_rgb));
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def("lattice_filter(Tensor image, Tensor planes, float sigma_xy, float sigma_rgb) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(wsss, CPU, m) { m.impl("lattice_filter", &lattice_filter_cpu); }

}  // namespace wsss
