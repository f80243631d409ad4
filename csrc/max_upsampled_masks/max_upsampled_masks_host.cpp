// wsss::max_upsampled_masks on CUDA: checks, allocation, stream; the kernels are in max_upsampled_masks_cuda.cu.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "check.h"
#include "max_upsampled_masks/max_upsampled_masks_check.h"

namespace wsss {
namespace {

// All of them contiguous.
UpsampleArrays arrays_of(const at::Tensor& logits, const at::Tensor& pairs, const at::Tensor& members, int64_t h,
                         int64_t w, int64_t out_h, int64_t out_w, int64_t limit) {
  UpsampleArrays a{};
  a.logits = logits.const_data_ptr();
  a.type = scalar_of(logits);
  a.pairs = pairs.const_data_ptr<int64_t>();
  a.members = bool_bytes(members);
  a.images = logits.size(0);
  a.num_pairs = pairs.size(0);
  a.h = h;
  a.w = w;
  a.out_h = out_h;
  a.out_w = out_w;
  a.disc = {limit, false};
  return a;
}

// A pair whose image is not in the batch has no members here; the host does not look at the values.
std::tuple<at::Tensor, at::Tensor> max_upsampled_masks_gpu(const at::Tensor& logits, const at::Tensor& pairs,
                                                           const at::Tensor& members, int64_t h, int64_t w,
                                                           int64_t out_h, int64_t out_w, int64_t limit) {
  check_max_upsampled(logits, pairs, members, h, w, out_h, out_w);
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto masks = logits.contiguous(), list = pairs.contiguous(), chosen = members.contiguous();
  auto out = at::empty({pairs.size(0), out_h, out_w}, logits.options().dtype(accumulate_type(logits)));
  auto winner = at::empty({pairs.size(0), out_h, out_w}, logits.options().dtype(at::kInt));
  if (h * w == 0) return {out.zero_(), winner.fill_(-1)};
  if (out.numel() == 0) return {out, winner};
  max_upsampled_masks_cuda(arrays_of(masks, list, chosen, h, w, out_h, out_w, limit), out.mutable_data_ptr(),
                           winner.mutable_data_ptr<int32_t>(), c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, winner};
}

at::Tensor max_upsampled_masks_backward_gpu(const at::Tensor& grad, const at::Tensor& winner, const at::Tensor& logits,
                                            const at::Tensor& pairs, const at::Tensor& members, int64_t h, int64_t w,
                                            int64_t limit) {
  check_max_upsampled_backward(grad, winner, logits, pairs.size(0));
  const int64_t out_h = winner.size(1), out_w = winner.size(2);
  check_max_upsampled(logits, pairs, members, h, w, out_h, out_w);
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto masks = logits.contiguous(), list = pairs.contiguous(), chosen = members.contiguous();
  const auto flow = grad.contiguous(), winners = winner.contiguous();
  auto result = at::empty(logits.sizes(), logits.options());
  if (result.numel() == 0) return result;
  max_upsampled_masks_backward_cuda(arrays_of(masks, list, chosen, h, w, out_h, out_w, limit), flow.const_data_ptr(),
                                    winners.const_data_ptr<int32_t>(), result.mutable_data_ptr(),
                                    c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(wsss, CUDA, m) {
  m.impl("max_upsampled_masks", &max_upsampled_masks_gpu);
  m.impl("max_upsampled_masks_backward", &max_upsampled_masks_backward_gpu);
}

}  // namespace wsss
