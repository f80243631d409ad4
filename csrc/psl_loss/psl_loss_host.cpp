// wsss::psl_loss on CUDA: checks, allocation, stream; the kernels are in psl_loss_cuda.cu.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "psl_loss/psl_loss_check.h"

namespace wsss {
namespace {

// All of them contiguous.
PslBatch batch_of(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& present,
                  int64_t ignore_index) {
  return {logits.const_data_ptr(), scalar_of(logits), labels.const_data_ptr<int64_t>(), bool_bytes(present),
          logits.size(0), logits.size(1), logits.size(2) * logits.size(3), ignore_index};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> psl_loss_gpu(const at::Tensor& logits,
                                                                        const at::Tensor& log_weights,
                                                                        const at::Tensor& labels,
                                                                        const at::Tensor& present,
                                                                        int64_t ignore_index) {
  check_psl_loss(logits, log_weights, labels, present);
  const c10::cuda::CUDAGuard guard(logits.device());
  const int64_t batch = logits.size(0);
  auto mask = at::empty(labels.sizes(), logits.options().dtype(at::kByte));
  auto labelled = at::zeros({batch}, log_weights.options()), online = at::zeros({batch}, log_weights.options());
  auto counts = at::zeros({batch, 2}, labels.options());
  if (mask.numel() == 0) return {labelled, online, mask, counts};
  const auto z = logits.contiguous(), weights = log_weights.contiguous(), given = labels.contiguous();
  const auto tags = present.contiguous();
  const PslBatch arguments = batch_of(z, given, tags, ignore_index);
  auto parts = at::empty({batch, psl_parts(arguments.pixels), 4}, logits.options().dtype(at::kDouble));
  psl_loss_cuda(arguments, weights.const_data_ptr<float>(), parts.mutable_data_ptr<double>(),
                labelled.mutable_data_ptr<float>(), online.mutable_data_ptr<float>(), mask.mutable_data_ptr<uint8_t>(),
                counts.mutable_data_ptr<int64_t>(), c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {labelled, online, mask, counts};
}

at::Tensor psl_loss_backward_gpu(const at::Tensor& grad_labelled, const at::Tensor& grad_online,
                                 const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& present,
                                 const at::Tensor& mask, const at::Tensor& counts, int64_t ignore_index) {
  check_psl_loss_backward(grad_labelled, grad_online, logits, labels, present, mask, counts);
  const c10::cuda::CUDAGuard guard(logits.device());
  auto gradient = at::empty(logits.sizes(), logits.options());
  if (gradient.numel() == 0) return gradient;
  const auto z = logits.contiguous(), given = labels.contiguous(), tags = present.contiguous();
  const auto winners = mask.contiguous(), numbers = counts.contiguous();
  const auto labelled = grad_labelled.contiguous(), online = grad_online.contiguous();
  psl_loss_backward_cuda(batch_of(z, given, tags, ignore_index), labelled.const_data_ptr<float>(),
                         online.const_data_ptr<float>(), winners.const_data_ptr<uint8_t>(),
                         numbers.const_data_ptr<int64_t>(), gradient.mutable_data_ptr(),
                         c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return gradient;
}

}  // namespace

TORCH_LIBRARY_IMPL(wsss, CUDA, m) {
  m.impl("psl_loss", &psl_loss_gpu);
  m.impl("psl_loss_backward", &psl_loss_backward_gpu);
}

}  // namespace wsss
