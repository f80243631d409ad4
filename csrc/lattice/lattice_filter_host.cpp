// wsss::lattice_filter on CUDA: checks, allocation, stream.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda_memory.h"
#include "lattice/lattice.h"
#include "lattice/lattice_filter.h"
#include "lattice/lattice_filter_check.h"

namespace wsss {
namespace {

at::Tensor lattice_filter_on_cuda(const at::Tensor& image, const at::Tensor& planes, double sigma_xy,
                                  double sigma_rgb) {
  check_lattice_filter(image, planes, sigma_xy, sigma_rgb);
  const int64_t batch = planes.size(0), channels = planes.size(1), h = planes.size(2), w = planes.size(3);
  const c10::cuda::CUDAGuard guard(planes.device());
  const auto colours = image.contiguous(), values = planes.contiguous();
  auto out = at::empty({batch, channels, h, w}, planes.options());
  if (out.numel() == 0) return out;
  TORCH_CHECK_VALUE(h * w < INT32_MAX / kMaxCorners, "lattice: too many points, got ", h * w);
  const LatticeFilterBatch arguments{colours.const_data_ptr<float>(),
                                     values.const_data_ptr<float>(),
                                     out.mutable_data_ptr<float>(),
                                     batch,
                                     channels,
                                     h,
                                     w,
                                     static_cast<float>(sigma_xy),
                                     static_cast<float>(sigma_rgb),
                                     lattice_images_at_once(batch, channels, h * w)};
  const bool fits = lattice_filter_cuda(arguments, caching_memory(), c10::cuda::getCurrentCUDAStream().stream());
  TORCH_CHECK_VALUE(fits, kLatticeTooSmall);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(wsss, CUDA, m) { m.impl("lattice_filter", &lattice_filter_on_cuda); }

}  // namespace wsss
