// wsss::erase_* on CUDA: checks, allocation, stream; the kernels are in erase_cuda.cu.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "erase/erase_check.h"

namespace wsss {
namespace {

EraseSizes sizes_of(const at::Tensor& maps, int64_t height, int64_t width) {
  return {maps.size(0), maps.size(1), maps.size(2), height, width};
}

DeviceStream current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

at::Tensor peaks_of(const at::Tensor& maps, const EraseSizes& sizes) {
  auto peaks = at::empty({maps.size(0)}, maps.options());
  erase_peaks_cuda(maps.const_data_ptr(), scalar_of(maps), sizes, peaks.mutable_data_ptr(), current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return peaks;
}

at::Tensor erase_maximum_gpu(const at::Tensor& maps, int64_t height, int64_t width) {
  check_erase_maps(maps, height, width, "erase_maximum");
  const c10::cuda::CUDAGuard guard(maps.device());
  if (maps.size(0) == 0 || height == 0 || width == 0) return at::zeros({}, maps.options());
  const auto values = maps.contiguous(), peaks = peaks_of(values, sizes_of(values, height, width));
  auto result = at::empty({}, maps.options());
  erase_maximum_cuda(peaks.const_data_ptr(), scalar_of(maps), maps.size(0), result.mutable_data_ptr(),
                     current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

at::Tensor erase_maximum_backward_gpu(const at::Tensor& grad, const at::Tensor& maximum, const at::Tensor& maps,
                                      int64_t height, int64_t width) {
  check_erase_maps(maps, height, width, "erase_maximum_backward");
  check_erase_scalar(grad, maps, "erase_maximum_backward", "grad");
  check_erase_scalar(maximum, maps, "erase_maximum_backward", "maximum");
  const c10::cuda::CUDAGuard guard(maps.device());
  if (maps.size(0) == 0 || height == 0 || width == 0) return at::zeros(maps.sizes(), maps.options());
  const auto values = maps.contiguous();
  auto result = at::empty(maps.sizes(), maps.options());
  auto counts = at::empty({maps.size(0)}, maps.options().dtype(at::kLong));
  erase_maximum_backward_cuda(grad.const_data_ptr(), maximum.const_data_ptr(), values.const_data_ptr(), scalar_of(maps),
                              sizes_of(values, height, width), counts.mutable_data_ptr<int64_t>(),
                              result.mutable_data_ptr(), current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

at::Tensor apply(const at::Tensor& images, const at::Tensor& maps, const at::Tensor& peaks, bool hard,
                 double threshold) {
  const auto pixels = images.contiguous();
  auto out = at::empty(images.sizes(), images.options());
  erase_apply_cuda(pixels.const_data_ptr(), scalar_of(images), maps.const_data_ptr(), peaks.const_data_ptr(), hard,
                   threshold, sizes_of(maps, images.size(2), images.size(3)), out.mutable_data_ptr(), current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

at::Tensor erase_soft_gpu(const at::Tensor& images, const at::Tensor& maps, const at::Tensor& maximum) {
  check_erase(images, maps, "erase_soft");
  check_erase_scalar(maximum, maps, "erase_soft", "maximum");
  const c10::cuda::CUDAGuard guard(images.device());
  if (images.numel() == 0) return at::empty(images.sizes(), images.options());
  return apply(images, maps.contiguous(), maximum, false, 0.0);
}

at::Tensor erase_hard_gpu(const at::Tensor& images, const at::Tensor& maps, double threshold) {
  check_erase(images, maps, "erase_hard");
  const c10::cuda::CUDAGuard guard(images.device());
  if (images.numel() == 0) return at::empty(images.sizes(), images.options());
  const auto values = maps.contiguous();
  return apply(images, values, peaks_of(values, sizes_of(values, images.size(2), images.size(3))), true, threshold);
}

std::tuple<at::Tensor, at::Tensor> erase_soft_backward_gpu(const at::Tensor& grad, const at::Tensor& images,
                                                           const at::Tensor& maps, const at::Tensor& maximum) {
  check_erase_soft_backward(grad, images, maps, maximum);
  const c10::cuda::CUDAGuard guard(images.device());
  if (images.numel() == 0) return {at::zeros(maps.sizes(), maps.options()), at::zeros({}, maps.options())};
  const auto flow = grad.contiguous(), pixels = images.contiguous(), values = maps.contiguous();
  const int64_t batch = maps.size(0), h = maps.size(1), w = maps.size(2);
  auto result = at::empty(maps.sizes(), maps.options()), grad_maximum = at::empty({}, maps.options());
  auto sums = at::empty({batch, h, 2, images.size(3)}, maps.options());
  auto parts = at::empty({batch, (h * w + kEraseThreads - 1) / kEraseThreads}, maps.options().dtype(at::kDouble));
  erase_soft_backward_cuda(flow.const_data_ptr(), pixels.const_data_ptr(), scalar_of(images), values.const_data_ptr(),
                           maximum.const_data_ptr(), sizes_of(values, images.size(2), images.size(3)),
                           sums.mutable_data_ptr(), parts.mutable_data_ptr<double>(), result.mutable_data_ptr(),
                           grad_maximum.mutable_data_ptr(), current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {result, grad_maximum};
}

}  // namespace

TORCH_LIBRARY_IMPL(wsss, CUDA, m) {
  m.impl("erase_maximum", &erase_maximum_gpu);
  m.impl("erase_maximum_backward", &erase_maximum_backward_gpu);
  m.impl("erase_soft", &erase_soft_gpu);
  m.impl("erase_soft_backward", &erase_soft_backward_gpu);
  m.impl("erase_hard", &erase_hard_gpu);
}

}  // namespace wsss
