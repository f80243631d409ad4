// wsss::radius_mask on CUDA: checks, allocation, stream; the kernels are in radius_mask_cuda.cu.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "radius_mask/radius_mask.h"
#include "radius_mask/radius_mask_check.h"

namespace wsss {
namespace {

at::Tensor radius_mask_gpu(const at::Tensor& logits, int64_t h, int64_t w, int64_t limit, bool chebyshev) {
  check_patch_masks(logits, h, w, "radius_mask", "logits");
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto values = logits.contiguous();
  auto out = at::empty(logits.sizes(), logits.options());
  if (out.numel() == 0) return out;
  radius_mask_cuda(values.const_data_ptr(), out.mutable_data_ptr(), scalar_of(logits), logits.size(0) * h * w, h, w,
                   {limit, chebyshev}, c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

at::Tensor radius_mask_backward_gpu(const at::Tensor& grad, const at::Tensor& out, int64_t h, int64_t w, int64_t limit,
                                    bool chebyshev) {
  check_radius_mask_backward(grad, out, h, w);
  TORCH_CHECK_VALUE(grad.device() == out.device(), "radius_mask_backward: grad and out must be on one device");
  const c10::cuda::CUDAGuard guard(out.device());
  const auto flow = grad.contiguous(), values = out.contiguous();
  auto result = at::empty(out.sizes(), out.options());
  if (result.numel() == 0) return result;
  radius_mask_backward_cuda(flow.const_data_ptr(), values.const_data_ptr(), result.mutable_data_ptr(), scalar_of(out),
                            out.size(0) * h * w, h, w, {limit, chebyshev},
                            c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(wsss, CUDA, m) {
  m.impl("radius_mask", &radius_mask_gpu);
  m.impl("radius_mask_backward", &radius_mask_backward_gpu);
}

}  // namespace wsss
