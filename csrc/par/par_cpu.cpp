// Schema of wsss::par and its CPU implementation.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

#include "check.h"
#include "par/par.h"

namespace wsss {
namespace {

void par_one_image(const float* image, const float* maps, float* out, int64_t channels, int64_t iterations,
                   const ParTaps& taps, const ParPadded& p) {
  const int64_t pixels = p.height * p.width;
  // One block of memory per image; every value that is used is written first, so it stays uninitialised.
  auto buffer = at::empty({(3 + 2 * channels) * p.plane + taps.count * p.height * p.columns}, at::kFloat);
  float* colours = buffer.mutable_data_ptr<float>();
  float* from = colours + 3 * p.plane;
  float* to = from + channels * p.plane;
  float* weights = to + channels * p.plane;

  auto load = [&](const float* source, float* target, int64_t planes) {
    at::parallel_for(0, planes, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t y = 0; y < p.height; ++y) {
          const float* row = source + c * pixels + y * p.width;
          std::copy(row, row + p.width, target + c * p.plane + (y + p.reach_y) * p.stride + p.reach_x);
        }
        par_fill_border(target + c * p.plane, p);
      }
    });
  };
  load(image, colours, 3);
  load(maps, from, channels);
  at::parallel_for(0, p.height, 4, [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y) par_weight_row(colours, taps, p, y, weights);
  });
  for (int64_t i = 0; i < iterations; ++i) {
    at::parallel_for(0, p.height, 4, [&](int64_t begin, int64_t end) {
      for (int64_t y = begin; y < end; ++y) par_sweep_row(from, to, weights, taps, p, channels, y);
    });
    at::parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) par_fill_border(to + c * p.plane, p);
    });
    std::swap(from, to);
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t y = 0; y < p.height; ++y) {
      const float* row = from + c * p.plane + (y + p.reach_y) * p.stride + p.reach_x;
      std::copy(row, row + p.width, out + c * pixels + y * p.width);
    }
  }
}

at::Tensor par_cpu(const at::Tensor& image, const at::Tensor& maps, at::IntArrayRef dilations,
                   at::ArrayRef<double> position_weights, int64_t iterations) {
  check_float32(image, 4, "par", "image");
  check_float32(maps, 4, "par", "maps");
  const int64_t batch = maps.size(0), channels = maps.size(1), h = maps.size(2), w = maps.size(3);
  TORCH_CHECK_VALUE(image.sizes() == at::IntArrayRef({batch, 3, h, w}), "par: image does not fit maps ", maps.sizes());
  TORCH_CHECK_VALUE(!dilations.empty() && dilations.size() * 8 <= kMaxTaps, "par: 1 to 32 dilations, got ",
                    dilations.size());
  for (const int64_t d : dilations) TORCH_CHECK_VALUE(d >= 1, "par: dilations must be >= 1, got ", d);
  TORCH_CHECK_VALUE(position_weights.size() == 8 * dilations.size(), "par: one position weight per tap");
  TORCH_CHECK_VALUE(iterations >= 0, "par: iterations must be >= 0, got ", iterations);
  const auto colours = image.contiguous(), values = maps.contiguous();
  auto out = at::empty({batch, channels, h, w}, maps.options());
  if (out.numel() == 0) return out;

  const ParTaps taps = make_taps(dilations.data(), static_cast<int>(dilations.size()), position_weights.data(), h, w);
  ParPadded p{};
  p.height = h;
  p.width = w;
  p.columns = (w + kParBlock - 1) / kParBlock * kParBlock;
  for (int n = 0; n < taps.count; ++n) {
    p.reach_y = std::max<int64_t>(p.reach_y, taps.dy[n]);
    p.reach_x = std::max<int64_t>(p.reach_x, taps.dx[n]);
  }
  p.stride = p.columns + 2 * p.reach_x;
  p.plane = p.stride * (h + 2 * p.reach_y);
  for (int64_t b = 0; b < batch; ++b) {
    par_one_image(colours.const_data_ptr<float>() + b * 3 * h * w, values.const_data_ptr<float>() + b * channels * h * w,
                  out.mutable_data_ptr<float>() + b * channels * h * w, channels, iterations, taps, p);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def(
      "par(Tensor image, Tensor maps, int[] dilations, float[] position_weights, int iterations) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(wsss, CPU, m) { m.impl("par", &par_cpu); }

}  // namespace wsss
