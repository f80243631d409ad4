// wsss::par on CUDA: checks, allocation, stream; the kernels are in par_cuda.cu.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "check.h"
#include "par/par.h"

namespace wsss {
namespace {

constexpr int64_t kMaxWeights = int64_t{1} << 26;  // floats of tap weights held at once: 256 MB

at::Tensor par_cuda(const at::Tensor& image, const at::Tensor& maps, at::IntArrayRef dilations,
                    at::ArrayRef<double> position_weights, int64_t iterations) {
  check_float32(image, 4, "par", "image");
  check_float32(maps, 4, "par", "maps");
  const int64_t batch = maps.size(0), channels = maps.size(1), h = maps.size(2), w = maps.size(3);
  TORCH_CHECK_VALUE(image.sizes() == at::IntArrayRef({batch, 3, h, w}), "par: image does not fit maps ", maps.sizes());
  TORCH_CHECK_VALUE(image.device() == maps.device(), "par: image and maps must be on one device");
  TORCH_CHECK_VALUE(!dilations.empty() && dilations.size() * 8 <= kMaxTaps, "par: 1 to 32 dilations, got ",
                    dilations.size());
  for (const int64_t d : dilations) TORCH_CHECK_VALUE(d >= 1, "par: dilations must be >= 1, got ", d);
  TORCH_CHECK_VALUE(position_weights.size() == 8 * dilations.size(), "par: one position weight per tap");
  TORCH_CHECK_VALUE(iterations >= 0, "par: iterations must be >= 0, got ", iterations);
  const c10::cuda::CUDAGuard guard(maps.device());
  const auto colours = image.contiguous(), values = maps.contiguous();
  auto out = at::empty({batch, channels, h, w}, maps.options());
  if (out.numel() == 0) return out;
  if (iterations == 0) return out.copy_(values);

  const ParTaps taps = make_taps(dilations.data(), static_cast<int>(dilations.size()), position_weights.data(), h, w);
  const int64_t chunk = std::min(batch, std::max<int64_t>(1, kMaxWeights / (taps.count * h * w)));
  auto weights = at::empty({chunk, taps.count, h, w}, maps.options());
  auto other = at::empty({chunk, channels, h, w}, maps.options());
  const auto stream = c10::cuda::getCurrentCUDAStream().stream();
  for (int64_t b = 0; b < batch; b += chunk) {
    const int64_t size = std::min(chunk, batch - b);
    par_weights_cuda(colours.const_data_ptr<float>() + b * 3 * h * w, taps, size, h, w,
                     weights.mutable_data_ptr<float>(), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    float* ends[2] = {out.mutable_data_ptr<float>() + b * channels * h * w, other.mutable_data_ptr<float>()};
    const float* from = values.const_data_ptr<float>() + b * channels * h * w;
    for (int64_t i = 0; i < iterations; ++i) {
      float* to = ends[(iterations - 1 - i) % 2];  // the last sweep writes to `out`
      par_sweep_cuda(from, to, weights.const_data_ptr<float>(), taps, size, channels, h, w, stream);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      from = to;
    }
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(wsss, CUDA, m) { m.impl("par", &par_cuda); }

}  // namespace wsss
