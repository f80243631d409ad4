// wsss::select_regions on CUDA: checks, allocation, stream; the kernels are in select_regions_cuda.cu.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "select_regions/select_regions_check.h"

namespace wsss {
namespace {

constexpr int64_t kRegionBytes = int64_t{1} << 26;  // packed regions held at once: 64 MB

// The values of `pairs` are not looked at on the host: they must lie inside [B, C], as those of the public op do.
std::tuple<at::Tensor, at::Tensor> select_regions_gpu(const at::Tensor& logits, const at::Tensor& scores,
                                                      const at::Tensor& pairs, int64_t h, int64_t w, int64_t limit,
                                                      double threshold, double low, double high, int64_t max_seeds,
                                                      int64_t top) {
  const Selection s =
      check_select_regions(logits, scores, pairs, h, w, limit, threshold, low, high, max_seeds, top);
  TORCH_CHECK_VALUE(logits.device() == scores.device() && pairs.device() == scores.device(),
                    "select_regions: mask_logits, scores and pairs must be on one device");
  const c10::cuda::CUDAGuard guard(scores.device());
  const int64_t images = scores.size(0), n = scores.size(1), c = scores.size(2), num_pairs = pairs.size(0);
  auto members = at::zeros({num_pairs, n}, scores.options().dtype(at::kBool));
  auto seeds = at::full({num_pairs, max_seeds}, -1, scores.options().dtype(at::kLong));
  if (members.numel() == 0) return {members, seeds};
  const auto masks = logits.contiguous(), confidences = scores.contiguous(), list = pairs.contiguous();
  const int64_t words = (n + 31) / 32, chunk = std::clamp<int64_t>(kRegionBytes / (s.top * words * 4), 1, num_pairs);
  auto peak = at::empty({images, c}, scores.options());
  auto winner = at::empty({images, n}, scores.options().dtype(at::kInt));
  auto order = at::empty({chunk, s.top}, winner.options());
  auto count = at::empty({chunk}, winner.options());
  auto regions = at::empty({chunk, s.top, words}, winner.options());
  auto open = at::empty({chunk, s.top}, scores.options().dtype(at::kByte));
  SelectArrays a{};
  a.logits = masks.const_data_ptr();
  a.type = scalar_of(masks);
  a.scores = confidences.const_data_ptr<float>();
  a.peak = peak.mutable_data_ptr<float>();
  a.winner = winner.mutable_data_ptr<int32_t>();
  a.order = order.mutable_data_ptr<int32_t>();
  a.count = count.mutable_data_ptr<int32_t>();
  a.regions = reinterpret_cast<uint32_t*>(regions.mutable_data_ptr<int32_t>());
  a.open = open.mutable_data_ptr<uint8_t>();
  const auto stream = c10::cuda::getCurrentCUDAStream().stream();
  select_winners_cuda(a, images, n, c, stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  for (int64_t p = 0; p < num_pairs; p += chunk) {
    a.pairs = list.const_data_ptr<int64_t>() + 2 * p;
    a.members = members.mutable_data_ptr<bool>() + p * n;
    a.seeds = seeds.mutable_data_ptr<int64_t>() + p * max_seeds;
    select_regions_cuda(a, s, std::min(chunk, num_pairs - p), h, w, c, stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {members, seeds};
}

}  // namespace

TORCH_LIBRARY_IMPL(wsss, CUDA, m) { m.impl("select_regions", &select_regions_gpu); }

}  // namespace wsss
