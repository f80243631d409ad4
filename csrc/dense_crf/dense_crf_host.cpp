// wsss::dense_crf on CUDA: checks, allocation, stream.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda_memory.h"
#include "dense_crf/dense_crf.h"
#include "dense_crf/dense_crf_check.h"
#include "lattice/lattice.h"

namespace wsss {
namespace {

at::Tensor dense_crf_on_cuda(const at::Tensor& unary, const at::Tensor& image, double spatial_sigma,
                             double spatial_weight, double sigma_xy, double sigma_rgb, double weight,
                             int64_t iterations, double prune, at::IntArrayRef sizes, c10::string_view mode) {
  check_dense_crf(unary, image, spatial_sigma, sigma_xy, sigma_rgb, iterations, sizes);
  TORCH_CHECK_VALUE(mode_of(mode) == Mode::fast, "dense_crf: the CUDA code has mode fast alone, got ", mode);
  const int64_t batch = unary.size(0), classes = unary.size(1), h = unary.size(2), w = unary.size(3);
  const c10::cuda::CUDAGuard guard(unary.device());
  const auto energies = unary.contiguous(), colours = image.contiguous();
  auto out = sizes.empty() ? at::empty({batch, classes, h, w}, unary.options())
                           : at::zeros({batch, classes, h, w}, unary.options());
  if (out.numel() == 0) return out;
  TORCH_CHECK_VALUE(h * w < INT32_MAX / kMaxCorners, "lattice: too many points, got ", h * w);
  const DenseCrfBatch arguments{energies.const_data_ptr<float>(),
                                colours.const_data_ptr<float>(),
                                out.mutable_data_ptr<float>(),
                                batch,
                                classes,
                                h,
                                w,
                                sizes.empty() ? nullptr : sizes.data(),
                                lattice_images_at_once(batch, classes, h * w)};
  const DenseCrfParams params{static_cast<float>(spatial_sigma), static_cast<float>(spatial_weight),
                              static_cast<float>(sigma_xy),      static_cast<float>(sigma_rgb),
                              static_cast<float>(weight),        iterations,
                              static_cast<float>(prune),     Mode::fast};
  const auto stream = c10::cuda::getCurrentCUDAStream().stream();
  TORCH_CHECK_VALUE(dense_crf_cuda(arguments, params, caching_memory(), stream), kLatticeTooSmall);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(wsss, CUDA, m) { m.impl("dense_crf", &dense_crf_on_cuda); }

}  // namespace wsss
