// wsss::c2am_pool on CUDA: checks, allocation, stream; the kernels are in c2am_pool_cuda.cu.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sigmoid.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "c2am_pool/c2am_pool_check.h"

namespace wsss {
namespace {

PoolSizes sizes_of(const at::Tensor& features) { return {features.size(0), features.size(1), features.size(2)}; }

std::tuple<at::Tensor, at::Tensor> c2am_pool_gpu(const at::Tensor& features, const at::Tensor& logits) {
  check_c2am_pool(features, logits, "c2am_pool");
  const c10::cuda::CUDAGuard guard(features.device());
  const int64_t batch = features.size(0), d = features.size(1);
  auto foreground = at::empty({batch, d}, logits.options()), background = at::empty({batch, d}, logits.options());
  if (foreground.numel() == 0) return {foreground, background};
  const auto values = features.contiguous(), q = at::sigmoid(logits.contiguous());
  c2am_pool_cuda(values.const_data_ptr(), scalar_of(features), q.const_data_ptr(), sizes_of(values),
                 foreground.mutable_data_ptr(), background.mutable_data_ptr(),
                 c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {foreground, background};
}

std::tuple<at::Tensor, at::Tensor> c2am_pool_backward_gpu(const at::Tensor& grad_foreground,
                                                          const at::Tensor& grad_background,
                                                          const at::Tensor& features, const at::Tensor& logits) {
  check_c2am_pool_backward(grad_foreground, grad_background, features, logits);
  const c10::cuda::CUDAGuard guard(features.device());
  auto grad_features = at::empty(features.sizes(), features.options());
  auto grad_logits = at::empty(logits.sizes(), logits.options());
  if (features.size(0) == 0) return {grad_features, grad_logits};
  const auto values = features.contiguous(), q = at::sigmoid(logits.contiguous());
  const auto inside = grad_foreground.contiguous(), outside = grad_background.contiguous();
  const int64_t chunks = (features.size(1) + kPoolChunk - 1) / kPoolChunk;
  auto parts = at::empty({features.size(0), chunks, features.size(2)}, logits.options());
  c2am_pool_backward_cuda(inside.const_data_ptr(), outside.const_data_ptr(), values.const_data_ptr(),
                          scalar_of(features), q.const_data_ptr(), sizes_of(values), parts.mutable_data_ptr(),
                          grad_features.mutable_data_ptr(), grad_logits.mutable_data_ptr(),
                          c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_features, grad_logits};
}

}  // namespace

TORCH_LIBRARY_IMPL(wsss, CUDA, m) {
  m.impl("c2am_pool", &c2am_pool_gpu);
  m.impl("c2am_pool_backward", &c2am_pool_backward_gpu);
}

}  // namespace wsss
