// wsss::dilate_regions on CUDA: checks, allocation, stream; the kernel is in dilate_regions_cuda.cu.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "check.h"
#include "dilate_regions/dilate_regions.h"

namespace wsss {
namespace {

at::Tensor dilate_regions_gpu(const at::Tensor& seeds, int64_t limit, bool chebyshev) {
  TORCH_CHECK_VALUE(seeds.dim() == 4, "dilate_regions: seeds must be [B, M, h, w], got ", seeds.sizes());
  TORCH_CHECK_TYPE(seeds.scalar_type() == at::kBool, "dilate_regions: seeds must be bool, got ", seeds.scalar_type());
  const int64_t count = seeds.size(0) * seeds.size(1), h = seeds.size(2), w = seeds.size(3);
  const c10::cuda::CUDAGuard guard(seeds.device());
  const auto maps = seeds.contiguous();
  auto out = at::empty(seeds.sizes(), seeds.options());
  if (out.numel() == 0) return out;
  const int64_t words = h * words_of(w);
  at::Tensor scratch;
  if (words * 8 > kDilateShared) scratch = at::empty({count, words}, seeds.options().dtype(at::kLong));
  auto* buffer = scratch.defined() ? reinterpret_cast<uint64_t*>(scratch.mutable_data_ptr<int64_t>()) : nullptr;
  dilate_regions_cuda(bool_bytes(maps), out.mutable_data_ptr<bool>(), buffer, count, h, w,
                      {limit, chebyshev}, c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(wsss, CUDA, m) { m.impl("dilate_regions", &dilate_regions_gpu); }

}  // namespace wsss
